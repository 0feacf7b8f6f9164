"""The machine's limits as errors that say what to do: memory that ran out, a disk that is full.

torch, safetensors and the system each say it in another way; whatever a run was doing then, its user gets one line
with the settings to lower, or the checkpoint to go on from.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from onebase.errors import OnebaseError, TrainingError
from onebase_training.checkpoint import last_checkpoint
from onebase_training.config import Recipe

_MEMORY: Final = ("out of memory", "can't allocate", "cannot allocate", "alloc_failed", "not enough memory")
_DISK: Final = ("no space left", "disk quota exceeded", "pytorchstreamwriter failed", "file write failed")
_DISK_CODES: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MEMORY)


def is_disk(error: BaseException) -> bool:
    """Whether there was no room left to write."""
    if isinstance(error, OSError):
        return error.errno in _DISK_CODES
    return any(text in str(error).lower() for text in _DISK)


def memory_error(recipe: Recipe, what: str, device: torch.device | None = None) -> TrainingError:
    """`what` did not fit: with the settings that take less memory, most helpful first, as they are now."""
    train, compute = recipe.train, recipe.compute
    on_gpu = device.type == "cuda" if device is not None else compute.device != "cpu" and torch.cuda.is_available()
    lower = [f"train.tokens_at_once ({train.tokens_at_once})", f"data.max_tokens ({recipe.data.max_tokens or 'auto'})"]
    if on_gpu and compute.gradient_checkpointing == "auto":
        lower.append(f"compute.memory_gb ({compute.memory_gb or 'most of what is free'})")
    advice = f"Lower {' or '.join(lower)}"
    if compute.gradient_checkpointing is not True:
        advice += ", or set compute.gradient_checkpointing: true"
    if not on_gpu and compute.keep_dequantized is not False:
        advice += ", or compute.keep_dequantized: false"
    where = "" if device is None else f" of {device}"
    return TrainingError(f"out of memory: {what} in the memory{where}. {advice}", code="out_of_memory")


@contextmanager
def told(recipe: Recipe, run_dir: Path | None = None) -> Iterator[None]:
    """What runs out inside becomes a TrainingError, `out_of_memory` or `disk_full`. `run_dir`: of the run, if any."""
    try:
        yield
    except OnebaseError:
        raise
    except Exception as error:
        if is_memory(error):
            raise memory_error(recipe, "what the run needs does not fit") from error
        if is_disk(error):
            raise _disk_error(error, run_dir) from error
        raise


def _disk_error(error: Exception, run_dir: Path | None) -> TrainingError:
    name = error.filename if isinstance(error, OSError) else None
    place = Path(name) if isinstance(name, str | Path) else run_dir or Path()
    there = next((folder for folder in (place, *place.parents) if folder.exists()), Path())
    free = shutil.disk_usage(there).free / 1e6
    last = last_checkpoint(run_dir) if run_dir is not None else None
    way = f"make room and go on from {last} with --resume" if last else "make room and start again"
    return TrainingError(f"no room to write on the disk of {place} ({free:,.0f} MB free): {way}", code="disk_full")
