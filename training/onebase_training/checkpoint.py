"""Checkpoints that are whole or absent, and the adapter's file inside them. Torch and safetensors; no pickled code.

A checkpoint is written into a hidden folder, flushed, then renamed to `checkpoint-N`; older ones go only after that.
A list of its files' digests tells later whether the disk still has what was written. It holds the adapter (PEFT's two
files), optimiser, scheduler, random state and Trainer's state: enough to go on bit for bit on CPU. Which rows come next
needs no state: the plan is a function of the recipe (`plan.py`).
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from onebase.adapter import WEIGHTS
from onebase.durable import fsync_folder
from onebase.errors import TrainingError

BEST: Final = "best"
STAGING: Final = ".staging"
SUMS: Final = "SHA256SUMS"


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


def save_best(model: Any, run: Path, step: int) -> None:
    """The best so far, whole or not at all; the one before goes only once it is there."""
    staged = run / ".best"
    shutil.rmtree(staged, ignore_errors=True)
    save_adapter(model, staged)
    _put(staged, run / f"{BEST}-{step}")
    for _, old in _numbered(run, BEST)[:-1]:
        shutil.rmtree(old)


def best_adapter(run: Path) -> Path | None:
    """That of the last evaluation that was the best so far."""
    found = _numbered(run, BEST)
    return found[-1][1] if found else None


def clear(run: Path) -> None:
    """A fresh run in a used folder: what an earlier one left there would mislead a later resume."""
    for old in (*run.glob("checkpoint-*"), *run.glob(f"{BEST}-*"), run / ".best", run / STAGING):
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
    """The checkpoint with the highest step."""
    found = _numbered(folder, "checkpoint")
    return found[-1][1] if found else None


def whole_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest whose files are as they were written, to go on from; None if there is none at all.

    Each damaged one is told. Raises TrainingError when all are.
    """
    found = [path for _, path in reversed(_numbered(folder, "checkpoint"))]
    for path in found:
        wrong = damage(path)
        if wrong is None:
            return path
        tell(f"{path} is damaged, so the one before it is tried: {wrong}")
    if found:
        raise TrainingError(f"no checkpoint in {folder} is whole: start without --resume", code="checkpoint_damaged")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with its files, by the list that was written with them; None: nothing."""
    try:
        lines = (checkpoint / SUMS).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return f"no {SUMS}: another build of onebase wrote it, or files are missing"
    for line in lines:
        known, _, name = line.partition("  ")
        try:
            if _sha256(checkpoint / name) != known:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def commit_checkpoint(staged: Path, folder: Path, keep: int) -> Path:
    """Flush the staged checkpoint, rename it into place, and drop all but the newest `keep`."""
    for unsafe in ("training_args.bin",):  # a pickle that nothing here reads (pitfall 15)
        (staged / unsafe).unlink(missing_ok=True)
    write_sums(staged)
    target = folder / staged.name
    _put(staged, target)
    for _, old in _numbered(folder, "checkpoint")[:-keep]:
        shutil.rmtree(old)
    return target


def write_sums(folder: Path) -> None:
    """The list of the folder's files, in the form of the `sha256sum` command."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    (folder / SUMS).write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in files), "utf-8")


def _put(staged: Path, target: Path) -> None:
    """Make the staged folder durable and let it appear as `target`; one that is there goes aside first."""
    for file in staged.iterdir():
        _fsync_file(file)
    fsync_folder(staged)
    aside = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(staged, target)
    fsync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _numbered(folder: Path, word: str) -> list[tuple[int, Path]]:
    """`word-7` as (7, path), in rising order."""
    found = ((path.name.removeprefix(f"{word}-"), path) for path in folder.glob(f"{word}-*"))
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
