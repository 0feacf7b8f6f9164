"""Causal attention within packed rows, forward and backward by hand: torch's FlashAttention on CUDA, else autograd.

For the layer that is written out whole (decoder_layer.py); attention.py has the same under autograd.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from onebase_training.attention import FLASH_DTYPES, attend, offsets


@dataclass(slots=True)
class Attended:
    """What the way back needs. `graph`: of the plain way, (q, k, v, out) with autograd's graph between them."""

    out: Tensor
    logsumexp: Tensor | None = None
    state: tuple[Tensor, Tensor] | None = None
    graph: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def forward(q: Tensor, k: Tensor, v: Tensor, scaling: float, borders: tuple[int, ...]) -> Attended:
    """q [T, heads, D], k and v [T, kv heads, D]; `borders`: the rows' starts and T."""
    if _has_flash(q):
        at, longest = offsets(borders, q.device), _longest(borders)
        out, logsumexp, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, at, at, longest, longest, 0.0, True, False, scale=scaling
        )
        return Attended(out, logsumexp, (state[0], state[1]))
    with torch.enable_grad():
        leaves = [x.detach()[None].requires_grad_() for x in (q, k, v)]
        out = attend(leaves[0], leaves[1], leaves[2], scaling, borders)
    return Attended(out.detach()[0], graph=(leaves[0], leaves[1], leaves[2], out))


def backward(
    saved: Attended, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scaling: float, borders: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; grad [T, heads, D]."""
    if saved.graph is not None:
        *leaves, out = saved.graph
        found = torch.autograd.grad(out, leaves, grad[None])
        return found[0][0], found[1][0], found[2][0]
    assert saved.logsumexp is not None
    assert saved.state is not None
    at, longest = offsets(borders, q.device), _longest(borders)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, saved.out, saved.logsumexp, at, at, longest, longest, 0.0, True, *saved.state, scale=scaling
    )
    return grads


def _has_flash(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in FLASH_DTYPES and q.shape[-1] % 8 == 0


def _longest(borders: tuple[int, ...]) -> int:
    return max(b - a for a, b in pairwise(borders))
