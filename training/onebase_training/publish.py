"""From trained weights to a version in the store: written, reopened, checked against memory, then published.

An adapter that is empty, not finite, or not what was trained never reaches the store (pitfall 17).
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onebase.adapter import WEIGHTS, AdapterFiles
from onebase.bases import BaseSpec
from onebase.errors import TrainingError
from onebase.store import AdapterStore, Version
from onebase_training.checkpoint import save_adapter
from onebase_training.config import Recipe


def write_checked(model: Any, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Save PEFT's two files and reopen them. Raises TrainingError naming what is wrong with the adapter."""
    from safetensors.torch import load_file

    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(model, folder, dict(tensors))
    read = load_file(folder / WEIGHTS)
    problems = []
    if set(read) != set(tensors):
        problems.append(f"{len(set(read) ^ set(tensors))} tensors differ from those trained")
    problems += [f"{key} is not finite" for key, value in read.items() if not torch.isfinite(value).all()]
    problems += [
        f"{key} was not written as it is in memory"
        for key, value in read.items()
        if key in tensors and not torch.equal(value, tensors[key].detach().cpu())
    ]
    ups = [value for key, value in read.items() if ".lora_B." in key]
    if not ups or not any(value.any() for value in ups):
        problems.append("every lora_B is zero: nothing was learnt")
    if problems:
        raise TrainingError(
            f"the trained adapter is not sound, nothing published: {'; '.join(problems[:5])}", code="adapter_unsound"
        )


def publish_adapter(
    store: AdapterStore,
    folder: Path,
    recipe: Recipe,
    spec: BaseSpec,
    metrics: Mapping[str, float | int | str | None],
    *,
    make_current: bool = True,
    aliases: Sequence[str] = (),
) -> Version | None:
    """Publish the checked folder as the next version; None when no server can serve its kind exactly (DoRA)."""
    if AdapterFiles.read(folder).config.unservable():
        return None
    return store.publish(
        folder,
        recipe.name,
        base=spec.identity,
        prompt_format=recipe.data.prompt_format,
        training=recipe.settings(),
        metrics=metrics,
        base_shapes=spec.linear_shapes,
        make_current=make_current,
        aliases=aliases,
    )
