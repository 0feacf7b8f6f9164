"""Attention over short packed rows on CPU, as plain matrix products with the gradient written out.

torch's fused CPU attention is made for long sequences: its bf16 backward is six times slower than this for rows of
125 tokens. Scores of one row are held (heads x L x L), so this is for rows up to `MAX_LENGTH`; see attention.py.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

MAX_LENGTH: Final = 512


class PackedCausalAttention(torch.autograd.Function):
    """query [T, heads, D], key and value [T, kv heads, D], row borders -> [T, heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, borders: tuple[int, ...], scaling: float
    ) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        groups = heads // kv_heads
        out = torch.empty_like(query)
        saved = []
        for a, b in pairwise(borders):
            q = _grouped(query[a:b], kv_heads)  # [kv, groups * L, D]
            k, v = key[a:b].transpose(0, 1), value[a:b].transpose(0, 1)
            scores = torch.baddbmm(_causal(b - a, groups, query.dtype), q, k.transpose(1, 2), alpha=scaling)
            weights = torch.softmax(scores, dim=-1)
            _ungroup(torch.bmm(weights, v), out[a:b])
            saved.append(weights)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.borders, ctx.scaling = borders, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        kv_heads = key.shape[1]
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for (a, b), weights in zip(pairwise(ctx.borders), saved, strict=True):
            q, g = _grouped(query[a:b], kv_heads), _grouped(grad[a:b], kv_heads)
            k, v = key[a:b].transpose(0, 1), value[a:b].transpose(0, 1)
            grads[2][a:b] = torch.bmm(weights.transpose(1, 2), g).transpose(0, 1)
            through = torch.bmm(g, v.transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(through, weights, -1, weights.dtype)
            _ungroup(torch.bmm(scores, k).mul_(ctx.scaling), grads[0][a:b])
            grads[1][a:b] = torch.bmm(scores.transpose(1, 2), q).mul_(ctx.scaling).transpose(0, 1)
        return *grads, None, None


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[L, heads, D] -> [kv heads, groups * L, D], so that each kv head meets all its queries in one product."""
    length, heads, size = x.shape
    return x.transpose(0, 1).reshape(kv_heads, (heads // kv_heads) * length, size)


def _ungroup(x: Tensor, into: Tensor) -> None:
    length, heads, size = into.shape
    into.copy_(x.view(heads, length, size).transpose(0, 1))


@lru_cache(maxsize=64)
def _causal(length: int, groups: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(length, length, dtype=dtype)
    mask.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu_(1), float("-inf"))
    return mask.repeat(groups, 1).unsqueeze(0)
