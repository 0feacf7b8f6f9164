"""Adapters in and out of slots: what is refused, where rows go, that memory stays what it was."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase.errors import AdapterInvalid
from onebase_server.engine.runner_torch import TorchRunner
from onebase_server.engine.types import AdapterRef
from step_driver import Driver, Sequence
from tiny_models import peft_adapter, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(make_runner: Callable[..., TorchRunner]) -> TorchRunner:
    return make_runner("llama", "torch", lora_rows=24)


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    where = models / "slots"
    model = tiny_model(models, "llama")
    for rank in (2, 5, 8, 16):
        peft_adapter(model, where, f"r{rank}", seed=rank, r=rank, target_modules=["q_proj", "up_proj"])
    peft_adapter(model, where, "r32", seed=1, r=32)
    return where


def ref(path: Path) -> AdapterRef:
    return AdapterRef(path.name, 1, path.name, path)


def answer(runner: TorchRunner, slot: int) -> list[int]:
    driver = Driver(runner)
    return driver.generate([driver.add(Sequence([4, 9, 33, 21], slot=slot))], 6)[0]


def test_slots_answer_alike_after_any_history_of_swaps(runner: TorchRunner, folder: Path) -> None:
    """Rows get scattered and moved together; every adapter still answers as when it was alone."""
    adapters = {rank: runner.read_adapter(ref(folder / f"r{rank}")) for rank in (2, 5, 8, 16)}
    expected = {}
    for rank, adapter in adapters.items():
        runner.load_slot(0, adapter)
        expected[rank] = answer(runner, 0)
        runner.clear_slot(0)
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    nbytes = runner.slots.nbytes
    held: dict[int, int] = {}
    choose = random.Random(3)
    for _ in range(60):
        slot, rank = choose.randrange(4), choose.choice((2, 5, 8, 16))
        held.pop(slot, None)
        runner.clear_slot(slot)
        if sum(held.values()) + rank <= 24:
            runner.load_slot(slot, adapters[rank])
            held[slot] = rank
    for slot, rank in held.items():
        assert answer(runner, slot) == expected[rank]
    assert runner.slots.nbytes == nbytes
    for slot in held:
        runner.clear_slot(slot)
        assert not runner.slot_ready(slot)


def test_an_adapter_above_the_rank_limit_is_refused_with_the_setting_to_change(
    runner: TorchRunner, folder: Path
) -> None:
    with pytest.raises(AdapterInvalid, match=r"rank 32 is above .* 16 \(max_lora_rank\)"):
        runner.read_adapter(ref(folder / "r32"))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -float("nan")], ids=str)
def test_values_that_are_not_finite_are_refused_by_name(
    value: float, runner: TorchRunner, folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "r2" / "adapter_model.safetensors")
    broken = next(iter(tensors))
    tensors[broken][0, 0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "r2" / "adapter_config.json").read_text())
    with pytest.raises(AdapterInvalid, match=broken):
        runner.read_adapter(ref(tmp_path))


def test_an_adapter_of_another_shape_is_refused(runner: TorchRunner, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "r2" / "adapter_model.safetensors")
    wrong = {name: torch.zeros(2, 64) if ".lora_A." in name else t for name, t in tensors.items()}
    save_file(wrong, tmp_path / "adapter_model.safetensors")
    config = json.loads((folder / "r2" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterInvalid, match="lora_A has shape"):
        runner.read_adapter(ref(tmp_path))


def test_only_projections_that_some_adapter_changes_are_active(runner: TorchRunner, folder: Path) -> None:
    runner.load_slot(0, runner.read_adapter(ref(folder / "r2")))
    assert runner.slots.active({-1}) == frozenset()
    assert runner.slots.active({-1, 0}) == {"qkv", "gate_up"}
    runner.clear_slot(0)
