"""Frozen linears that read the same rows, with their LoRAs, as one matrix product: q, k and v, or gate and up.

One product fills the device where three leave gaps between them, and the rows go through memory once for all three
adapters. Forward and backward are written out; autograd is the layer's affair (decoder_layer.py). Knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from onebase_training.layer_ops import shrink, shrink_back

MAX_RANK = 128


@dataclass(frozen=True, slots=True)
class Linear:
    """One frozen linear [N, K]. `weight` unpacks its values, into a tensor where one is given."""

    weight: Any  # fuse.UnpackedWeight
    shape: tuple[int, int]
    bias: Tensor | None
    a: nn.Parameter | None = None  # [r, K] in fp32
    b: nn.Parameter | None = None  # [N, r]
    scaling: float = 1.0


class LinearGroup:
    """y [T, sum of N] = x W^T + bias + scale * dropout(x) A^T B^T, x [T, K].

    A and B are used in the compute dtype, from copies that each forward pass renews: A as [modules, R, K] and B as a
    block-diagonal [sum of N, modules * R], R being the largest rank, at least 16 (a tensor core's tile).
    """

    def __init__(self, linears: Sequence[Linear], dropout: float, dtype: torch.dtype) -> None:
        self._linears, self._dtype, self.dropout = list(linears), dtype, dropout
        self.parameters = [p for linear in linears if linear.a is not None for p in (linear.a, linear.b)]
        ends = list(accumulate((linear.shape[0] for linear in linears), initial=0))
        self._rows = [slice(a, b) for a, b in pairwise(ends)]
        self.width = ends[-1]
        self._bias = self._joined_bias()
        self._adapted = [(rows, one) for rows, one in zip(self._rows, linears, strict=True) if one.a is not None]
        self._scales = [one.scaling for _, one in self._adapted]
        self._copies: tuple[Tensor, Tensor] | None = None
        """A and B in the compute dtype, made at the first use: by then the model is on its device."""

    @property
    def learns(self) -> bool:
        return bool(self._adapted)

    def forward(self, x: Tensor, seed: int | None, *, renew: bool = True) -> tuple[Tensor, Tensor | None]:
        """-> (y, what `backward` needs besides x). `seed` of the dropout: None for none. `renew` is false where the
        same step computes again."""
        low = self.low(x, seed, renew=renew)
        weight = self._weight(x.device)
        if low is None:
            y = x @ weight.T
        else:
            # The small term first: the product with W is added to it in fp32 and rounded once. The other way round,
            # W x would already lie on bf16's grid and a young adapter's whole share would be rounded away.
            y = low @ self._held(x.device)[1].T
            y.addmm_(x, weight.T)
        if self._bias is not None:
            y += self._bias
        return y, low

    def low(self, x: Tensor, seed: int | None, *, renew: bool) -> Tensor | None:
        """dropout(x) A^T, scaled: [T, modules * R]."""
        if not self._adapted:
            return None
        if renew:
            self._renew(x.device)
        return shrink(x, self._held(x.device)[0], self._scales, *self._drawn(seed))

    def backward(
        self,
        grad: Tensor,
        low: Tensor | None,
        x: Tensor | None,
        gain: Tensor | None,
        seed: int | None,
        *,
        needs_x: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """-> (x's gradient, A's and B's of each linear that has them). The rows were x, times `gain` where given."""
        grad_x = grad @ self._weight(grad.device) if needs_x else None
        if low is None:
            return grad_x, []
        assert x is not None
        a, b = self._held(grad.device)
        grad_low = grad @ b
        grad_b = grad.T @ low
        grad_a = shrink_back(grad_x, x, gain, grad_low, a, self._scales, *self._drawn(seed))
        found = []
        for index, (rows, one) in enumerate(self._adapted):
            assert one.a is not None
            rank, start = one.a.shape[0], index * a.shape[1]
            found.append(grad_a[start : start + rank].to(one.a.dtype))
            found.append(grad_b[rows, start : start + rank].to(one.a.dtype))
        return grad_x, found

    def _drawn(self, seed: int | None) -> tuple[float, int]:
        return (0.0, 0) if seed is None else (self.dropout, seed)

    def _weight(self, device: torch.device) -> Tensor:
        """[sum of N, K], unpacked anew."""
        if len(self._linears) == 1:
            only: Tensor = self._linears[0].weight()
            return only
        weight = torch.empty(self.width, self._linears[0].shape[1], dtype=self._dtype, device=device)
        for rows, linear in zip(self._rows, self._linears, strict=True):
            linear.weight(weight[rows])
        return weight

    def _held(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._copies is None:
            ranks = [one.a.shape[0] for _, one in self._adapted if one.a is not None]
            rank = 1 << (max(16, *ranks) - 1).bit_length()
            a = torch.zeros(len(ranks), rank, self._linears[0].shape[1], dtype=self._dtype, device=device)
            self._copies = a, torch.zeros(self.width, len(ranks) * rank, dtype=self._dtype, device=device)
        return self._copies

    def _renew(self, device: torch.device) -> None:
        a, b = self._held(device)
        rank = a.shape[1]
        for index, (rows, one) in enumerate(self._adapted):
            assert one.a is not None
            assert one.b is not None
            a[index, : one.a.shape[0]].copy_(one.a)
            b[rows, index * rank : index * rank + one.b.shape[1]].copy_(one.b)

    def _joined_bias(self) -> Tensor | None:
        given = [linear.bias for linear in self._linears if linear.bias is not None]
        if not given:
            return None
        joined = torch.zeros(self.width, dtype=self._dtype, device=given[0].device)
        for rows, linear in zip(self._rows, self._linears, strict=True):
            if linear.bias is not None:
                joined[rows].copy_(linear.bias)
        return joined
