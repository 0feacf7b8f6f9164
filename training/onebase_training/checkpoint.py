"""Checkpoints that are whole or absent, and the adapter's file inside them. Torch and safetensors; no pickled code.

A checkpoint is written into a hidden folder, flushed, then renamed to `checkpoint-N`; older ones go only after that.
It holds the adapter (PEFT's two files), optimiser, scheduler, random state and Trainer's state: enough to go on
bit for bit on CPU. Which rows come next needs no state: the plan is a function of the recipe (`plan.py`).
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

import torch

from onebase.adapter import WEIGHTS
from onebase.durable import fsync_folder
from onebase.errors import TrainingError

BEST: Final = "best"
_NAME: Final = re.compile(r"checkpoint-(\d+)")
RECIPE_HASH: Final = "recipe.sha256"


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's names -> LoRA tensors (the adapter's own name left out, as PEFT saves them). Views, not copies."""
    import peft

    state: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def save_adapter(model: Any, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """PEFT's two files. Never asks the hub, never saves embeddings (pitfalls 4 and 19)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own = {k: v.detach().cpu().contiguous() for k, v in (tensors or adapter_tensors(model)).items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    training, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = training


def save_best(model: Any, run: Path) -> None:
    """Over the best so far, atomically."""
    staged = run / ".best"
    shutil.rmtree(staged, ignore_errors=True)
    save_adapter(model, staged)
    for file in staged.iterdir():
        _fsync_file(file)
    shutil.rmtree(run / BEST, ignore_errors=True)
    os.rename(staged, run / BEST)
    fsync_folder(run)


def best_adapter(run: Path) -> Path | None:
    return run / BEST if (run / BEST / WEIGHTS).is_file() else None


def clear(run: Path) -> None:
    """A fresh run in a used folder: what an earlier one left there would mislead a later resume."""
    for old in (*run.glob("checkpoint-*"), run / BEST, run / ".best", run / ".staging"):
        shutil.rmtree(old, ignore_errors=True)


def load_adapter_tensors(model: Any, folder: Path) -> None:
    """Set the LoRA weights from an adapter folder. Raises TrainingError when names or shapes differ."""
    from safetensors.torch import load_file

    set_adapter_tensors(model, load_file(folder / WEIGHTS), str(folder))


def set_adapter_tensors(model: Any, tensors: dict[str, torch.Tensor], source: str) -> None:
    own = adapter_tensors(model)
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise TrainingError(
            f"the adapter in {source} has other tensors than this recipe makes ({len(wrong)}, such as {wrong[0]}): "
            "rank, targets and layers must stay as they were"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def last_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return max(found)[1] if found else None


def commit_checkpoint(staged: Path, folder: Path, keep: int) -> Path:
    """Flush the staged checkpoint, rename it into place, and drop all but the newest `keep`."""
    for unsafe in ("training_args.bin",):  # a pickle that nothing here reads (pitfall 15)
        (staged / unsafe).unlink(missing_ok=True)
    for file in staged.iterdir():
        _fsync_file(file)
    fsync_folder(staged)
    target = folder / staged.name
    if target.exists():
        shutil.rmtree(target)
    os.rename(staged, target)
    fsync_folder(folder)
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    for _, old in sorted(numbered)[:-keep]:
        shutil.rmtree(old)
    return target


def require_same_recipe(checkpoint: Path, recipe_hash: str) -> None:
    """A checkpoint goes on only under the settings that it was made with."""
    file = checkpoint / RECIPE_HASH
    if not file.is_file() or file.read_text("utf-8").strip() != recipe_hash:
        raise TrainingError(
            f"{checkpoint} was made by another recipe, or the data has changed since: start afresh, "
            "or put the recipe back as it was"
        )


def _fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
