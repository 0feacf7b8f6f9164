"""Rows of random tokens, and a micro-batch's loss and gradients to compare."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onebase_training.objective import Objective
from onebase_training.rows import Row


def make_rows(*lengths: int, seed: int = 0) -> list[Row]:
    """Rows of random tokens; about half of each is learnt, in spans."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        learnt = rng.random(n) < 0.5
        learnt[0], learnt[-1] = False, True
        rows.append(Row(rng.integers(3, 600, n).astype(np.int32), learnt))
    return rows


def loss_and_gradients(target: Objective, batches: Sequence[Any]) -> tuple[float, dict[str, Tensor]]:
    target.zero_grad(set_to_none=True)
    losses = [target(batch).loss for batch in batches]
    total: Any = torch.stack(losses).sum()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in target.named_parameters() if p.grad is not None}
    return sum(loss.item() for loss in losses), gradients


def assert_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert set(one[1]) == set(other[1])
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=2e-4, atol=2e-6)
