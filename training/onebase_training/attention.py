"""Causal attention that stays inside each packed row, registered with transformers under one name.

The rows of a packed micro-batch are attended one by one, so packing costs no masked-out work and no mask in memory
(a block-diagonal mask over 2,048 tokens would compute ten times what ten rows of 200 need). On CUDA with a fitting
dtype, torch's varlen kernel does all rows in one launch.
"""

from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

NAME: Final = "onebase_packed"


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    borders: tuple[int, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, kv heads, T, D] -> [B, T, heads, D].

    `borders` are the packed rows' starts and the end (B = 1); None: each of the B rows is one sequence, padding right.
    """
    assert attention_mask is None, "rows are separated by borders, and padding lies behind what is learnt"
    if borders is None or len(borders) == 2:
        return _causal(query, key, value, scaling, dropout).transpose(1, 2), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _varlen(query, key, value, scaling, borders), None
    parts = [
        _causal(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling, dropout) for a, b in pairwise(borders)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def register() -> str:
    """Make the name known to transformers; returns it. Masks are not built for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, borders: tuple[int, ...]) -> Tensor:
    """All rows in one launch, through jagged nested tensors (torch >= 2.6; FlashAttention's varlen kernel below)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    offsets = torch.tensor(borders, device=query.device)
    longest = max(b - a for a, b in pairwise(borders))
    shortest = min(b - a for a, b in pairwise(borders))

    def jagged(x: Tensor) -> Tensor:
        rows = x[0].transpose(0, 1).contiguous()  # [T, heads, D]
        nested = torch.nested.nested_tensor_from_jagged(rows, offsets, min_seqlen=shortest, max_seqlen=longest)
        return nested.transpose(1, 2)

    out = F.scaled_dot_product_attention(jagged(query), jagged(key), jagged(value), is_causal=True, scale=scaling)
    return out.transpose(1, 2).values().unsqueeze(0)
