"""Adapters into slots on the card: laid out to the bit, refused if not finite, in order with the steps under way."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

torch = pytest.importorskip("torch")

from adapter_cases import CASES, Case, check_slot, make_loader, write_case  # noqa: E402
from onebase.errors import AdapterInvalid  # noqa: E402
from onebase_server.engine.copy_streams import CudaStreams  # noqa: E402

SLEEP = 200_000_000
"""Cycles: a tenth of a second."""


def wait(loader, slot: int) -> None:
    torch.cuda.synchronize()
    assert loader.is_ready(slot)


def cuda_loader(streams: CudaStreams | None = None, **options: int):
    return make_loader("cuda", streams or CudaStreams(torch.device("cuda")), **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1], ids=["whole", "chunks"])
@pytest.mark.parametrize("arena", [1 << 20, 0], ids=["pinned", "ordinary"])
def test_a_file_is_laid_out_to_the_bit(case: Case, chunk_bytes: int, arena: int, tmp_path: Path) -> None:
    tensors = write_case(tmp_path / "a", case)
    slots, loader = cuda_loader(chunk_bytes=chunk_bytes, arena=arena)
    adapter = loader.read(tmp_path / "a")
    assert (adapter.block.place is not None) == adapter.block.tensor.is_pinned() == bool(arena)
    for slot in (3, 0):
        loader.load(slot, adapter)
        wait(loader, slot)
        check_slot(slots, slot, tmp_path / "a", tensors)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3.4e38], ids=str)
def test_values_that_are_not_finite_are_refused_by_name(side: str, value: float, tmp_path: Path) -> None:
    broken = f"base_model.model.model.layers.4.self_attn.k_proj.lora_{side}.weight"
    write_case(tmp_path / "bad", CASES[0], spoil={broken: value})
    tensors = write_case(tmp_path / "good", CASES[0], seed=1)
    slots, loader = cuda_loader()
    loader.load(2, loader.read(tmp_path / "bad"))
    torch.cuda.synchronize()
    with pytest.raises(AdapterInvalid) as caught:
        loader.is_ready(2)
    assert [problem.split()[0] for problem in caught.value.problems] == [broken]
    loader.clear(2)
    loader.load(2, loader.read(tmp_path / "good"))
    wait(loader, 2)
    check_slot(slots, 2, tmp_path / "good", tensors)


def test_steps_find_rows_whole_before_and_after_they_are_moved(tmp_path: Path) -> None:
    """A slow step reads rows where they were; the next one reads them where they are now, though the move is late."""

    class Late(CudaStreams):
        def copies_wait(self) -> None:
            super().copies_wait()
            torch.cuda._sleep(SLEEP)

    folders = {rank: write_case(tmp_path / f"r{rank}", Case("", {"r": rank}), seed=rank) for rank in (6, 8, 16)}
    slots, loader = cuda_loader(Late(torch.device("cuda")), rows=30)
    for slot, rank in ((0, 8), (1, 6), (2, 8)):
        loader.load(slot, loader.read(tmp_path / f"r{rank}"))
        wait(loader, slot)
    loader.clear(0)
    moving = slots.owner(1)
    assert moving is not None
    there = slots.a["qkv"][:, :, moving.span].clone()
    adapter = loader.read(tmp_path / "r16")
    torch.cuda._sleep(SLEEP)
    under_way = slots.a["qkv"][:, :, moving.span].clone()
    loader.load(3, adapter)
    following = slots.a["qkv"][:, :, moving.span].clone()
    wait(loader, 3)
    assert moving.start == 0
    assert torch.equal(under_way, there)
    assert torch.equal(following, there)
    for slot, rank in ((1, 6), (2, 8), (3, 16)):
        check_slot(slots, slot, tmp_path / f"r{rank}", folders[rank])


def test_a_load_does_not_wait_for_the_device_on_the_host(tmp_path: Path) -> None:
    """The engine's thread goes on at once, though the device is busy."""
    write_case(tmp_path / "a", CASES[0])
    _, loader = cuda_loader()
    adapter = loader.read(tmp_path / "a")
    loader.load(0, adapter)  # what is compiled or allocated at first use
    wait(loader, 0)
    torch.cuda._sleep(5 * SLEEP)
    loader.load(1, adapter)
    assert not loader.is_ready(1)
    wait(loader, 1)
