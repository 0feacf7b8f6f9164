"""Held-out rows measured by the objective that trains: loss and accuracy over their learnt tokens, and no gradient."""

from collections.abc import Callable, Sequence

import torch

from onebase_training.batches import MicroBatch, collate
from onebase_training.objective import Objective
from onebase_training.plan import micro_batches
from onebase_training.rows import Row


def held_out_metrics(
    objective: Objective,
    batches: Sequence[MicroBatch],
    device: torch.device,
    prefix: str = "eval_",
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """`loss`, `accuracy` and `tokens` over the learnt tokens of all batches; nothing once `stopped()`."""
    was_training = objective.training
    objective.eval()
    nll = correct = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            if stopped():
                objective.train(was_training)
                return {}
            losses = objective(batch.to(device))
            nll += losses.nll_sum.item()
            correct += losses.correct.item()
            tokens += len(batch.targets)
    objective.train(was_training)
    return {
        f"{prefix}loss": nll / max(1, tokens),
        f"{prefix}accuracy": correct / max(1, tokens),
        f"{prefix}tokens": float(tokens),
    }


def eval_batches(rows: Sequence[Row], *, tokens_at_once: int, pad_id: int) -> list[MicroBatch]:
    groups = micro_batches(rows, tokens_at_once, packing=True)
    return [collate([rows[i] for i in g], [0.0] * len(g), packing=True, pad_id=pad_id) for g in groups]
