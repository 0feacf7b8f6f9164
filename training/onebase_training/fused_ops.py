"""The operations that a Llama layer spends its time in, each with its gradient written out.

Autograd's own chain of small operations reads and writes memory several times where once will do; on CPU that costs
more than the matrix products. Each function here is tested against the plain expression in fp64
(tests/training/test_fused_ops.py); on CUDA the small ones run as one Triton kernel each, tested against these.
Nothing here knows PEFT, transformers or a model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onebase_training.cuda_choice import triton_for

WeightSource = Callable[[], Tensor]
"""Gives a frozen weight [out, in] in the compute dtype, unpacked anew or held."""


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (dropout(x) A^T) B^T, with W frozen. x [..., K], A [r, K] and B [N, r] in fp32.

    A and B are used in x's dtype and their gradients come back in fp32. W is asked for again in the backward pass, so
    that a 4-bit weight need not stay unpacked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: WeightSource,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float = 0.0,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dropped, mask = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        low = dropped @ a.to(x.dtype).T
        # The small term first: the product with W is added to it in fp32 and rounded once. The other way round, W x
        # would already lie on bf16's grid and a young adapter's whole share would be rounded away.
        y = low @ _scaled(b, scaling, x.dtype).T
        y.addmm_(rows, weight().T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(rows, low, a, b, mask)  # and not what is left of rows: q, k and v share these
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        ctx.upscale = 1 / (1 - dropout)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b, mask = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ _scaled(b, ctx.scaling, grad.dtype)
        dropped = rows if mask is None else torch.ops.aten.native_dropout_backward(rows, mask, ctx.upscale)
        grad_a = (grad_low.T @ dropped).to(a.dtype)
        grad_b = (grad.T @ low).to(b.dtype).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ a.to(grad.dtype)
            if mask is not None:
                grad_x = torch.ops.aten.native_dropout_backward(grad_x, mask, ctx.upscale)
            grad_x = grad_x.addmm_(grad, ctx.weight()).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def _scaled(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Scaling goes into the small matrix, in fp32 and rounded once, and costs no pass over the activations."""
    return (b * scaling).to(dtype)


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + bias with W frozen. Nothing is saved: W is asked for again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: WeightSource, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight(), None, None


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * w over the last dimension, w frozen. Statistics in fp32 at least; the result in `dtype`.

    x is the residual stream, which may be wider than `dtype`; so is its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.of = x.dtype
        if (triton := triton_for(x, weight)) is not None:
            normed, out, scale = triton.rms_forward(x, weight, eps, dtype)
            ctx.save_for_backward(normed, scale, weight)
            return out  # type: ignore[no-any-return]
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        normed = (x * scale).to(dtype)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        if (triton := triton_for(grad, normed)) is not None:
            return triton.rms_backward(grad, normed, weight, scale, ctx.of), None, None, None
        grad = grad * weight.to(grad.dtype)
        along = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1]).unsqueeze(-1)
        return grad.addcmul_(normed, along, value=-1).to(ctx.of).mul_(scale), None, None, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if (triton := triton_for(gate, up)) is not None:
            return triton.swiglu_forward(gate, up)  # type: ignore[no-any-return]
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if (triton := triton_for(gate, up, grad)) is not None:
            return triton.swiglu_backward(gate, up, grad)  # type: ignore[no-any-return]
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
    if (triton := triton_for(x, cos, sin)) is not None:
        return triton.rotate(x, cos, sin, sign)  # type: ignore[no-any-return]
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
