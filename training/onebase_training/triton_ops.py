"""The small operations of a Llama layer on CUDA, one pass over memory each, in Triton: norm, SwiGLU, rotation.

Twins of the plain torch in fused_ops.py and layer_ops.py, and tested against them (tests/gpu/test_training_ops.py).
Import only where Triton is: cuda_choice.py decides. Knows no model.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _rms_forward(  # type: ignore[no-untyped-def]
    x, more, weight, total, normed, out, scale, eps, width, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(more + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * width + at, values.to(total.dtype.element_ty), mask=inside)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    narrow = (values * factor).to(normed.dtype.element_ty)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + at, narrow, mask=inside)
    tl.store(out + row * width + at, (narrow.to(tl.float32) * gain).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, factor)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_backward(  # type: ignore[no-untyped-def]
    grad, normed, weight, scale, above, out, narrow, width, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32) * gain
    n = tl.load(normed + row * width + at, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(g * n, axis=0) / width
    result = (g - n * along) * tl.load(scale + row)
    if ADDS:
        result += tl.load(above + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(narrow + row * width + at, result.to(narrow.dtype.element_ty), mask=inside)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_forward(gate, up, out, width, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)  # rounded where plain torch rounds
    u = tl.load(up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (silu * u).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_backward(  # type: ignore[no-untyped-def]
    gate, up, grad, grad_gate, grad_up, width, stride, BLOCK: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    tl.store(grad_up + row * stride + at, (above * g * share).to(grad_up.dtype.element_ty), mask=inside)
    slope = share * (1.0 + g * (1.0 - share))
    tl.store(grad_gate + row * stride + at, (above * u * slope).to(grad_gate.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, out, length, angles, batch_stride, token_stride, head_stride, out_stride, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: all its heads. `angles` rows of cos and sin serve the tokens in turn. `out` may be x."""
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (at < HALF)
    source = x + (token // length) * batch_stride + (token % length) * token_stride + head * head_stride + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = (token % angles) * (2 * HALF) + at
    c = tl.load(cos + angle, mask=at < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=at < HALF, other=0.0).to(tl.float32) * sign
    target = out + token * out_stride + head * (2 * HALF) + at
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def rms_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., width] -> (normed in `dtype`, normed * weight, 1 / rms in fp32 [.., 1])."""
    return _norm(x.contiguous(), None, None, weight, eps, dtype)


def add_rms_forward(
    x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + more in x's dtype, and `rms_forward` of it)."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, *_norm(x.contiguous(), more.contiguous(), total, weight, eps, dtype)


def _norm(
    x: Tensor, more: Tensor | None, total: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    out = torch.empty_like(normed)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _rms_forward[(x.numel() // width,)](
        x, more if more is not None else x, weight, total if total is not None else x, normed, out, scale, eps, width,
        ADDS=more is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return normed, out, scale


def rms_backward(grad: Tensor, normed: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x, in `dtype`."""
    out = torch.empty(normed.shape, dtype=dtype, device=normed.device)
    _norm_back(grad.contiguous(), normed, weight, scale, None, out, out)
    return out


def rms_backward_onto(
    grad: Tensor, normed: Tensor, weight: Tensor, scale: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    """above + the gradient of x: in above's dtype, and in grad's."""
    out, narrow = torch.empty_like(above, memory_format=torch.contiguous_format), torch.empty_like(normed)
    _norm_back(grad.contiguous(), normed, weight, scale, above.contiguous(), out, narrow)
    return out, narrow


def _norm_back(
    grad: Tensor, normed: Tensor, weight: Tensor, scale: Tensor, above: Tensor | None, out: Tensor, narrow: Tensor
) -> None:
    width = normed.shape[-1]
    block = triton.next_power_of_2(width)
    _rms_backward[(normed.numel() // width,)](
        grad, normed, weight, scale, above if above is not None else grad, out, narrow, width,
        ADDS=above is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [.., width], alike in their strides: halves of one tensor's rows, or each on its own."""
    gate, up, stride = _side_by_side(gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    grid = (gate.numel() // width, triton.cdiv(width, 1024))
    _swiglu_forward[grid](gate, up, out, width, stride, BLOCK=1024)
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, grad: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`into`: where the gradients go, with the strides of gate and up; for those that are 2-D."""
    if into is None:
        gate, up = gate.contiguous(), up.contiguous()
    gate, up, stride = _side_by_side(gate, up)
    grad_gate, grad_up = into or (torch.empty_like(gate), torch.empty_like(up))
    width = gate.shape[-1]
    assert into is None or grad_gate.stride() == grad_up.stride() == (stride, 1)
    grid = (gate.numel() // width, triton.cdiv(width, 1024))
    _swiglu_backward[grid](gate, up, grad.contiguous(), grad_gate, grad_up, width, stride, BLOCK=1024)
    return grad_gate, grad_up


def _side_by_side(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both with rows `stride` values apart."""
    if gate.dim() == 2 and gate.stride() == up.stride() and gate.stride(1) == 1:
        return gate, up, gate.stride(0)
    return gate.contiguous(), up.contiguous(), gate.shape[-1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor | None = None) -> Tensor:
    """x [B, T, heads, D]; cos and sin [B or 1, T, D], contiguous. `out`: x itself or its like, heads side by side."""
    batch, length, heads, size = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    assert out.stride(2) == size
    assert out.stride(3) == 1
    assert batch == 1 or out.stride(0) == length * out.stride(1)
    cos, sin = cos.contiguous(), sin.contiguous()
    half = size // 2
    _rotate[(batch * length,)](
        x, cos, sin, out, length, cos.numel() // size, x.stride(0), x.stride(1), x.stride(2), out.stride(1), sign,
        HEADS=heads, HALF=half,
        HEAD_BLOCK=triton.next_power_of_2(heads), HALF_BLOCK=triton.next_power_of_2(half),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
