"""Rows -> tensors for one forward pass. Packed end to end (positions restart, attention stays inside each row) or
padded side by side. The pad id never meets the loss: what is learnt is a list of places, not a label per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onebase_training.rows import Row


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B x T tokens, M of them learnt. Packed: B = 1 and `borders` are the rows' starts and the end."""

    ids: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], from 0 in each row
    borders: tuple[int, ...] | None
    sources: Tensor  # int64 [M]: flat place of the token that predicts
    targets: Tensor  # int64 [M]: the id to predict
    weights: Tensor  # float32 [M]: this token's share of the step's loss
    tokens: int
    """Without padding."""

    def to(self, device: torch.device) -> "MicroBatch":
        """To CUDA by way of pinned memory: the copy waits for nothing that runs there."""
        tensors = {name: getattr(self, name) for name in ("ids", "positions", "sources", "targets", "weights")}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def token_weights(rows: Sequence[Row], normalize: Literal["tokens", "rows"]) -> list[float]:
    """Each row's weight per learnt token, so that a step's loss is the weighted sum over all its micro-batches.

    tokens: 1 / (learnt tokens of the whole step), the right mean whatever the accumulation (transformers #34191).
    rows: the mean of the rows' own means.
    """
    if normalize == "tokens":
        total = max(1, sum(row.supervised for row in rows))
        return [1.0 / total] * len(rows)
    counted = max(1, sum(row.supervised > 0 for row in rows))
    return [1.0 / (counted * row.supervised) if row.supervised else 0.0 for row in rows]


def collate(rows: Sequence[Row], weights: Sequence[float], *, packing: bool, pad_id: int) -> MicroBatch:
    """One micro-batch. `weights[i]` is the weight of each learnt token of `rows[i]`."""
    lengths = [len(row) for row in rows]
    width = sum(lengths) if packing else max(lengths)
    starts = [sum(lengths[:i]) for i in range(len(rows))] if packing else [i * width for i in range(len(rows))]
    ids = torch.full((sum(lengths) if packing else len(rows) * width,), pad_id, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    sources, targets, shares = [], [], []
    for row, start, weight in zip(rows, starts, weights, strict=True):
        tokens = torch.from_numpy(row.ids).to(torch.int64)
        ids[start : start + len(row)] = tokens
        positions[start : start + len(row)] = torch.arange(len(row))
        places = torch.from_numpy(row.learnt).nonzero().flatten()
        places = places[places > 0]  # a row's first token has nothing before it in its own row
        sources.append(places - 1 + start)
        targets.append(tokens[places])
        shares.append(torch.full((len(places),), weight, dtype=torch.float32))
    shape = (1, -1) if packing else (len(rows), width)
    return MicroBatch(
        ids=ids.view(shape),
        positions=positions.view(shape),
        borders=(*starts, width) if packing else None,
        sources=torch.cat(sources),
        targets=torch.cat(targets),
        weights=torch.cat(shares),
        tokens=sum(lengths),
    )
