"""The heaviest micro-batch goes first, before hours are spent: it either fits in memory, or the run ends with advice.

On CUDA it also finds by measuring how many layers may keep their activations (recompute.py).
"""

import torch
from rich.console import Console

from onebase_training.batches import MicroBatch
from onebase_training.config import Recipe
from onebase_training.limits import is_memory, memory_error
from onebase_training.objective import Objective
from onebase_training.recompute import Recompute, layers_that_fit, memory_limit
from onebase_training.trainer import PlanTrainer

_LONG_ON_CPU = 2048
"""Tokens from which the extra step is worth its time on CPU."""


def check(trainer: PlanTrainer, recipe: Recipe, console: Console) -> None:
    """Forward and backward of the plan's heaviest micro-batch, without a trace in weights or random state.

    Raises TrainingError saying what to lower when it does not fit.
    """
    device, setting = trainer.args.device, recipe.compute.preflight
    if setting == "auto":
        setting = device.type == "cuda" or trainer.steps.longest_row() >= _LONG_ON_CPU
    if not setting:
        return
    objective = trainer.model
    objective.train()
    batch = trainer.steps.heaviest()
    kept = ""
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            on_device = batch.to(device)
            peak = _step(objective, on_device)
            if objective.recompute is not None:
                kept = _keep_what_fits(objective, objective.recompute, on_device, peak)
                peak = _step(objective, on_device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        raise memory_error(recipe, f"{batch.ids.numel()} tokens at once do not fit", device) from error
    finally:
        objective.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what loading and the trials left behind is not the run's to hold
    console.print(f"preflight: {batch.ids.numel()} tokens at once fit{_told(device, peak)}{kept}")


def _step(objective: Objective, batch: MicroBatch) -> int:
    """One forward and backward; the peak of memory in bytes (0 on CPU)."""
    if batch.ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(batch.ids.device)
    objective(batch).loss.backward()  # gradients stay, as between the micro-batches of a step
    return torch.cuda.max_memory_allocated(batch.ids.device) if batch.ids.is_cuda else 0


def _keep_what_fits(objective: Objective, recompute: Recompute, batch: MicroBatch, peak: int) -> str:
    """Let as many layers keep their activations as stay below the limit; says how many."""
    device = batch.ids.device
    per_layer = _standing(objective, recompute, batch, 1) - _standing(objective, recompute, batch, 0)
    limit = memory_limit(recompute.limit_gb, device)
    recompute.keep(layers_that_fit(limit, peak, per_layer, len(recompute)))
    return f"; {recompute.kept} of {len(recompute)} layers keep their activations"


def _standing(objective: Objective, recompute: Recompute, batch: MicroBatch, kept: int) -> int:
    """Bytes that stand between forward and backward when `kept` layers keep theirs."""
    recompute.keep(kept)
    losses = objective(batch)
    standing = torch.cuda.memory_allocated(batch.ids.device)
    del losses
    return standing


def _told(device: torch.device, peak: int) -> str:
    if device.type != "cuda":
        return ""
    return f", peak {peak / 1e9:.1f} of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB"
