"""The arena for adapters' files: places come back, never overlap, and low room moves old blocks out unharmed."""

import gc
import random
from itertools import pairwise

import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from onebase_server.engine.host_memory import HostBlock, HostMemory  # noqa: E402

PAGE = 4096


def fill(memory: HostMemory, pages: int, value: int) -> HostBlock:
    block = memory.block(pages * PAGE - 5)
    block.tensor.fill_(value)
    memory.let_go(block)
    return block


def test_blocks_hold_their_bytes_through_any_history() -> None:
    memory = HostMemory(64 * PAGE, pin=False)
    choose = random.Random(4)
    live: list[tuple[HostBlock, int]] = []
    for step in range(400):
        if len(live) > 12 or (live and choose.random() < 0.4):
            del live[choose.randrange(len(live))]
        live.append((fill(memory, choose.randint(1, 12), step % 251), step % 251))
        if step % 20 == 0:
            memory.settle()
        spans = sorted(block.place for block, _ in live if block.place is not None)
        assert all(a[0] + a[1] <= b[0] for a, b in pairwise(spans))
        assert all((block.tensor == value).all() for block, value in live)
    live.clear()
    memory.settle()
    gc.collect()
    assert memory.free_bytes == 64 * PAGE


def test_what_was_not_used_longest_leaves_first_until_the_reserve_is_free() -> None:
    memory = HostMemory(16 * PAGE, pin=False)
    blocks = [fill(memory, 4, i) for i in range(3)]
    memory.hold(blocks[0])
    memory.let_go(blocks[0])
    blocks.append(fill(memory, 4, 3))
    memory.settle()
    assert [block.place is None for block in blocks] == [False, True, False, False]
    assert [int(block.tensor[-1]) for block in blocks] == [0, 1, 2, 3]
    assert memory.free_bytes == 4 * PAGE


def test_what_does_not_fit_is_ordinary_memory() -> None:
    memory = HostMemory(4 * PAGE, pin=False)
    large = fill(memory, 5, 7)
    assert large.place is None
    assert (large.tensor == 7).all()
    assert fill(HostMemory(0, pin=False), 1, 1).place is None
