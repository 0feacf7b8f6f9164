"""Which device a process trains on: alone, and as one of several. CUDA is played: its rules are ours to keep."""

from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.errors import RecipeError
from onebase_training.assemble import keep_on_one_device, training_arguments
from onebase_training.config import ComputeConfig, make_recipe
from onebase_training.lora import compute_settings

pytestmark = pytest.mark.slow


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine of two GPUs; what torch was told to use."""
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    return used


@pytest.mark.parametrize(
    ("named", "rank", "device"),
    [
        *[("auto", None, "cuda"), ("cuda", None, "cuda"), ("cuda:1", None, "cuda:1"), ("cpu", 1, "cpu")],
        *[("auto", 0, "cuda:0"), ("auto", 1, "cuda:1"), ("cuda", 1, "cuda:1")],
    ],
)
def test_pitfall_21_each_process_has_the_gpu_of_its_number(
    chosen: list[int], named: str, rank: int | None, device: str
) -> None:
    got = compute_settings(ComputeConfig(device=named), rank)

    assert got == torch.device(device)
    assert chosen == ([] if got.type == "cpu" else [got.index or 0]), "before the base is loaded there"


@pytest.mark.parametrize(
    ("named", "rank", "word"),
    [
        ("cuda:0", 1, "say cuda, and each takes its own"),
        ("auto", 2, "torch sees 2"),
        ("cuda:7", None, "torch sees 2"),
        ("gpu", None, "'gpu' is none; use auto, cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused(chosen: list[int], named: str, rank: int | None, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        compute_settings(ComputeConfig(device=named), rank)


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_trainer_stays_on_the_device_of_the_base_and_copies_the_model_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    recipe = make_recipe({"name": "x", "data": {"train": "d.jsonl"}})
    args: Any = training_arguments(recipe, tmp_path, 10, torch.device("cpu"))
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)

    keep_on_one_device(args, torch.device(device))

    assert (args.device, args.n_gpu, used) == (torch.device("cuda", index), 1, [index])
