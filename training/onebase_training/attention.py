"""Causal attention that stays inside each packed row, registered with transformers under one name.

The rows of a packed micro-batch are attended one by one, so packing costs no masked-out work and no mask in memory
(a block-diagonal mask over 2,048 tokens would compute ten times what ten rows of 200 need). On CUDA with a fitting
dtype, torch's varlen kernel does all rows in one launch.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase_training.packed_cpu import MAX_LENGTH, PackedCausalAttention

NAME: Final = "onebase_packed"
FLASH_DTYPES: Final = (torch.bfloat16, torch.float16)


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
    """transformers' form: query [B, heads, T, D], key and value [B, kv heads, T, D] -> [B, T, heads, D]."""
    assert attention_mask is None, "rows are separated by borders, and padding lies behind what is learnt"
    assert not dropout, "no base of the Llama family drops attention"
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale, borders), None


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, borders: tuple[int, ...] | None) -> Tensor:
    """query [B, T, heads, D], key and value [B, T, kv heads, D] -> [B, T, heads, D].

    `borders` are the packed rows' starts and the end (B = 1); None: each of the B rows is one sequence, padding right.
    """
    batch, length = query.shape[:2]
    rows = borders or (0, length)
    longest = max(b - a for a, b in pairwise(rows))
    if query.device.type == "cpu" and batch == 1 and longest <= MAX_LENGTH:
        return PackedCausalAttention.apply(query[0], key[0], value[0], rows, scaling).unsqueeze(0)  # type: ignore[no-untyped-call, no-any-return]
    if len(rows) > 2 and query.is_cuda and query.dtype in FLASH_DTYPES and query.shape[-1] % 8 == 0:
        return _varlen(query, key, value, scaling, rows)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if len(rows) == 2:
        return _causal(query, key, value, scaling).transpose(1, 2)
    parts = [_causal(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling) for a, b in pairwise(rows)]
    return torch.cat(parts, dim=2).transpose(1, 2)


def register() -> str:
    """Make the name known to transformers; returns it. Masks are not built for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float, borders: tuple[int, ...]) -> Tensor:
    """All rows in one launch of torch's own FlashAttention, which torch.nn.attention.varlen (its form changes from
    version to version) calls too: this operation's is the same from torch 2.5 to 2.13. -> [1, T, heads, D]."""
    at = offsets(borders, query.device)
    longest = max(b - a for a, b in pairwise(borders))
    out = torch.ops.aten._flash_attention_forward(
        query[0], key[0], value[0], at, at, longest, longest, 0.0, True, False, scale=scaling
    )
    rows: Tensor = out[0]
    return rows.unsqueeze(0)


@lru_cache(maxsize=4)
def offsets(borders: tuple[int, ...], device: torch.device) -> Tensor:
    """The borders on the device, int32: copied once a micro-batch, not once a layer, and without waiting."""
    offsets = torch.tensor(borders, dtype=torch.int32)
    return offsets.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else offsets.to(device)
