"""The longest micro-batch goes first, before hours are spent: it either fits in memory, or the run ends with advice."""

from typing import Any

import torch
from rich.console import Console

from onebase.errors import TrainingError
from onebase_training.trainer import PlanTrainer

_LONG_ON_CPU = 2048
"""Tokens from which the extra step is worth its time on CPU."""


def check(trainer: PlanTrainer, setting: bool | str, console: Console) -> None:
    """Forward and backward of the plan's heaviest micro-batch, without a trace in weights or random state.

    Raises TrainingError saying what to lower when it does not fit.
    """
    steps = trainer.steps
    heaviest = steps.heaviest_step()
    device = trainer.args.device
    if setting == "auto":
        setting = device.type == "cuda" or steps.longest_row() >= _LONG_ON_CPU
    if not setting:
        return
    random_state = torch.get_rng_state()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    objective = trainer.model
    objective.train()
    batch = max(steps[heaviest], key=lambda micro: micro.ids.numel())
    try:
        objective(batch.to(device)).loss.backward()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise TrainingError(
            f"{batch.ids.numel()} tokens at once do not fit in the memory of {device}. Lower train.tokens_at_once or "
            "data.max_tokens, or set compute.gradient_checkpointing: true",
            code="out_of_memory",
        ) from error
    finally:
        objective.zero_grad(set_to_none=True)
        torch.set_rng_state(random_state)
    console.print(f"preflight: {batch.ids.numel()} tokens at once fit{_peak(device)}")


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    used, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return f", peak {used / 1e9:.1f} of {total / 1e9:.1f} GB"


def _is_memory(error: Any) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in str(error).lower()
