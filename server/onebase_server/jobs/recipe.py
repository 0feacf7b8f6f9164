"""A retrain request -> the recipe file that the training process reads. The keys are the recipe's own.

Training is another package behind a process border: this writes its documented file format and imports nothing of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from onebase.durable import replace_file

# What a caller may set -> (section, key) of the recipe.
KNOBS: Mapping[str, tuple[str, str]] = {
    "epochs": ("train", "epochs"),
    "max_steps": ("train", "max_steps"),
    "batch_size": ("train", "batch_size"),
    "learning_rate": ("train", "learning_rate"),
    "seed": ("train", "seed"),
    "early_stopping": ("train", "early_stopping"),
    "r": ("lora", "r"),
    "alpha": ("lora", "alpha"),
    "dropout": ("lora", "dropout"),
    "target_modules": ("lora", "target_modules"),
    "use_rslora": ("lora", "use_rslora"),
    "max_tokens": ("data", "max_tokens"),
    "eval_fraction": ("data", "eval_fraction"),
    "device": ("compute", "device"),
    "dtype": ("compute", "dtype"),
    "threads": ("compute", "threads"),
}


@dataclass(frozen=True, slots=True)
class RetrainOrder:
    """What to train. `dataset` is an absolute path that the caller may read; `base` is an id or a path."""

    adapter: str
    dataset: Path
    base: str
    preset: str = "default"
    prompt_format: str | None = None
    """None: the preset's."""
    resume_from: str | None = None
    """A version to go on from, instead of a fresh adapter."""
    hyperparameters: Mapping[str, Any] | None = None
    """Keys of `KNOBS`."""


def recipe_of(order: RetrainOrder) -> dict[str, Any]:
    """The recipe as plain values."""
    recipe: dict[str, Any] = {
        "name": order.adapter,
        "base": order.base,
        "preset": order.preset,
        "data": {"train": [str(order.dataset)]},
    }
    if order.prompt_format is not None:
        recipe["data"]["prompt_format"] = order.prompt_format
    if order.resume_from is not None:
        recipe["resume_from"] = order.resume_from
    for knob, value in (order.hyperparameters or {}).items():
        section, key = KNOBS[knob]
        recipe.setdefault(section, {})[key] = value
    return recipe


def write_recipe(path: Path, order: RetrainOrder) -> None:
    replace_file(path, yaml.safe_dump(recipe_of(order), sort_keys=False, allow_unicode=True).encode())
