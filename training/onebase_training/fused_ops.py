"""The four operations that a Llama layer spends its time in, each with its gradient written out.

Autograd's own chain of small operations reads and writes memory several times where once will do; on CPU that costs
more than the matrix products. Each function here is tested against the plain expression in fp64
(tests/training/test_fused_ops.py). Nothing here knows PEFT, transformers or a model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WeightSource = Callable[[], Tensor]
"""Gives a frozen weight [out, in] in the compute dtype, unpacked anew or held."""


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, with W frozen. x [..., K], A [r, K] and B [N, r] in fp32.

    A and B are used in x's dtype and their gradients come back in fp32. W is asked for again in the backward pass, so
    that a 4-bit weight need not stay unpacked.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: WeightSource, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).T
        # The small term first: the product with W is added to it in fp32 and rounded once. The other way round, W x
        # would already lie on bf16's grid and a young adapter's whole share would be rounded away.
        y = (low @ b.to(x.dtype).T).mul_(scaling)
        y.addmm_(rows, weight().T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(rows, low, a, b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b.to(grad.dtype)
        grad_a = (grad_low.T @ rows).to(a.dtype).mul_(ctx.scaling)
        grad_b = (grad.T @ low).to(b.dtype).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_low @ a.to(grad.dtype)).mul_(ctx.scaling)
            grad_x = grad_x.addmm_(grad, ctx.weight()).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * w over the last dimension, w frozen. Statistics in fp32 at least; the result in `dtype`.

    x is the residual stream, which may be wider than `dtype`; so is its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        normed = (x * scale).to(dtype)
        ctx.save_for_backward(normed, scale, weight)
        ctx.of = x.dtype
        return normed * weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        grad = grad * weight.to(grad.dtype)
        along = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1]).unsqueeze(-1)
        return grad.addcmul_(normed, along, value=-1).to(ctx.of).mul_(scale), None, None, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, torch.nn.functional.silu(gate).mul_(grad)


class Rotary(torch.autograd.Function):
    """Rotary positions, the half-split form of Llama. x [B, T, heads, D]; cos and sin [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    # Both halves of cos and sin hold the same angles.
    c, s = cos[..., None, :half], sin[..., None, :half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, c, out=out[..., :half])
    out[..., :half].addcmul_(second, s, value=-sign)
    torch.mul(second, c, out=out[..., half:])
    out[..., half:].addcmul_(first, s, value=sign)
    return out
