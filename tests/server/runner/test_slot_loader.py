"""Adapters into slots, the CPU's way and the GPU's (whose operations run on any device): the same bits, whatever the
file is like; who waits for whom; what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from adapter_cases import CASES, Case, Now, bare_weights, check_slot, expected, make_loader, write_case  # noqa: E402
from onebase.errors import AdapterInvalid  # noqa: E402
from onebase_server.engine.host_adapter import AdapterReader, layout_of  # noqa: E402

BROKEN = "base_model.model.model.layers.4.self_attn.k_proj.lora_{}.weight"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1], ids=["whole", "chunks"])
def test_the_device_lays_a_file_out_to_the_bit(case: Case, chunk_bytes: int, tmp_path: Path) -> None:
    tensors = write_case(tmp_path / "a", case)
    slots, loader = make_loader("cpu", Now(), chunk_bytes=chunk_bytes)
    adapter = loader.read(tmp_path / "a")
    assert len(adapter.plan.chunks) == 1 or chunk_bytes == 1
    for slot in (3, 0):
        loader.load(slot, adapter)
        assert loader.is_ready(slot)
        check_slot(slots, slot, tmp_path / "a", tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_lays_a_file_out_to_the_bit(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = write_case(tmp_path / "a", case)
    reader = AdapterReader(layout_of(bare_weights("cpu", dtype)), None, 16, longest_run=1)
    host = reader.read_laid_out(tmp_path / "a", dtype)
    rank, a, b = expected(tmp_path / "a", tensors, dtype)
    assert host.rank == rank
    for name in a:
        assert torch.equal(host.a[name], a[name]), name
        assert torch.equal(host.b[name], b[name]), name


def test_a_regular_file_takes_few_copies(tmp_path: Path) -> None:
    """Layers 0 1 10 11 2 ... 9 in the file: each run of neighbours is one piece."""
    write_case(tmp_path / "a", CASES[0])
    _, loader = make_loader("cpu", Now())
    (chunk,) = loader.read(tmp_path / "a").plan.chunks
    runs = {(piece.layer, piece.count) for piece in chunk.pieces}
    assert runs == {(0, 2), (2, 8), (10, 2)}
    assert len(chunk.pieces) == 3 * 6


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3.4e38], ids=str)
def test_values_that_are_not_finite_are_refused_by_name_and_the_slot_can_be_used_again(
    side: str, value: float, tmp_path: Path
) -> None:
    """The largest fp32 number has no place in bf16."""
    broken = BROKEN.format(side)
    write_case(tmp_path / "bad", CASES[0], spoil={broken: value})
    tensors = write_case(tmp_path / "good", CASES[0], seed=1)
    slots, loader = make_loader("cpu", Now())
    loader.load(2, loader.read(tmp_path / "bad"))
    with pytest.raises(AdapterInvalid) as caught:
        loader.is_ready(2)
    assert [problem.split()[0] for problem in caught.value.problems] == [broken]
    loader.clear(2)
    loader.load(2, loader.read(tmp_path / "good"))
    assert loader.is_ready(2)
    check_slot(slots, 2, tmp_path / "good", tensors)
    reader = AdapterReader(layout_of(bare_weights("cpu", torch.bfloat16)), None, 16, longest_run=1)
    with pytest.raises(AdapterInvalid, match=broken):
        reader.read_laid_out(tmp_path / "bad", torch.bfloat16)


def test_a_plan_is_kept_for_folders_of_one_recipe_and_for_no_other(tmp_path: Path) -> None:
    write_case(tmp_path / "a", CASES[0])
    write_case(tmp_path / "b", CASES[0], seed=1)
    other = write_case(tmp_path / "c", Case("other alpha", {"lora_alpha": 5}))
    slots, loader = make_loader("cpu", Now())
    a, b, c = (loader.read(tmp_path / name) for name in "abc")
    assert a.plan is b.plan
    assert c.plan is not a.plan
    loader.load(0, c)
    check_slot(slots, 0, tmp_path / "c", other)


class Recorder(Now):
    """Notes what the pools held whenever one stream was told to wait for the other."""

    def __init__(self) -> None:
        self.log: list[tuple[str, torch.Tensor]] = []
        self.pool = torch.zeros(0)
        self.is_copying = False

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.is_copying = True
        yield
        self.is_copying = False

    def copies_wait(self) -> None:
        assert self.is_copying
        self.log.append(("copies", self.pool.clone()))

    def compute_waits(self) -> None:
        assert self.is_copying
        self.log.append(("compute", self.pool.clone()))


def test_rows_are_written_and_moved_behind_the_steps_under_way_and_later_steps_wait_for_moves(tmp_path: Path) -> None:
    """A step may still read rows where they were: nothing changes before the wait. And the next one reads them where
    they are now: it waits, if any were moved."""
    folders = {}
    for name, rank in (("r8", 8), ("r6", 6), ("r16", 16)):
        folders[name] = write_case(tmp_path / name, Case(name, {"r": rank}), seed=rank)
    streams = Recorder()
    slots, loader = make_loader("cpu", streams, rows=30)
    streams.pool = slots.a["qkv"]
    for slot, name in ((0, "r8"), (1, "r6"), (2, "r8")):
        loader.load(slot, loader.read(tmp_path / name))
    assert [who for who, _ in streams.log] == ["copies"] * 3
    loader.clear(0)  # 8 rows free before slot 1, 8 behind slot 2
    before, streams.log = slots.a["qkv"].clone(), []
    loader.load(3, loader.read(tmp_path / "r16"))
    (first, untouched), (second, moved) = streams.log
    assert (first, second) == ("copies", "compute")
    assert torch.equal(untouched.nan_to_num(), before.nan_to_num())
    assert torch.equal(moved[:, :, 0:6], before[:, :, 8:14])
    assert torch.equal(moved[:, :, 6:14], before[:, :, 14:22])
    for slot, name in ((1, "r6"), (2, "r8"), (3, "r16")):
        assert loader.is_ready(slot)
        check_slot(slots, slot, tmp_path / name, folders[name])


def test_an_adapter_that_is_being_copied_stays_where_its_bytes_are(tmp_path: Path) -> None:
    """The arena has room for two; a read makes room for the next one, but not of what the device still reads."""

    class Slow(Now):
        is_done = False

        def query(self) -> bool:
            return self.is_done

    write_case(tmp_path / "a", CASES[0])
    streams = Slow()
    _, loader = make_loader("cpu", streams, arena=250 << 10)
    first = loader.read(tmp_path / "a")
    assert first.block.place is not None
    loader.load(0, first)
    second = loader.read(tmp_path / "a")  # kept: its place must not come back by itself
    loader._memory.settle()
    assert first.block.place is not None
    assert not loader.is_ready(0)
    streams.is_done = True
    assert loader.is_ready(0)
    third = loader.read(tmp_path / "a")
    loader._memory.settle()
    assert first.block.place is None
    assert torch.equal(first.block.tensor, second.block.tensor)
    assert torch.equal(first.block.tensor, third.block.tensor)
