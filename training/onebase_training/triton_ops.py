"""The small operations of a Llama layer on CUDA, one pass over memory each, in Triton: norm, SwiGLU, rotation, NF4.

Twins of the plain torch in fused_ops.py and of bitsandbytes' dequantisation, and tested against them
(tests/gpu/test_training_ops.py). Import only where Triton is: cuda_choice.py decides. Knows no model.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _rms_forward(x, weight, normed, out, scale, eps, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    narrow = (values * factor).to(normed.dtype.element_ty)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + at, narrow, mask=inside)
    tl.store(out + row * width + at, (narrow.to(tl.float32) * gain).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, factor)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_backward(grad, normed, weight, scale, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32) * gain
    n = tl.load(normed + row * width + at, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(g * n, axis=0) / width
    result = (g - n * along) * tl.load(scale + row)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_forward(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)  # rounded where plain torch rounds
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (silu * u).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_backward(gate, up, grad, grad_gate, grad_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    tl.store(grad_up + at, (above * g * share).to(grad_up.dtype.element_ty), mask=inside)
    slope = share * (1.0 + g * (1.0 - share))
    tl.store(grad_gate + at, (above * u * slope).to(grad_gate.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, out, length, angles, batch_stride, token_stride, head_stride, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: all its heads. `angles` rows of cos and sin serve the tokens in turn."""
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (at < HALF)
    source = x + (token // length) * batch_stride + (token % length) * token_stride + head * head_stride + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = (token % angles) * (2 * HALF) + at
    c = tl.load(cos + angle, mask=at < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=at < HALF, other=0.0).to(tl.float32) * sign
    target = out + token * (HEADS * 2 * HALF) + head * (2 * HALF) + at
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    packed, code, absmax, absmax_code, absmax_scale, offset, out, blocks,
    NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`BLOCKS` blocks of 64 weights: 32 bytes each, the high nibble first."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    if NESTED:
        index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_code + index) * tl.load(absmax_scale + block // 256, mask=inside, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    byte = tl.arange(0, 32)[None, :]
    pair = tl.load(packed + block[:, None] * 32 + byte, mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    target = out + block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(target, values, mask=inside[:, None])


def rms_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., width] -> (normed in `dtype`, normed * weight, 1 / rms in fp32 [.., 1])."""
    x, width = x.contiguous(), x.shape[-1]
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    out = torch.empty_like(normed)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _rms_forward[(x.numel() // width,)](x, weight, normed, out, scale, eps, width, BLOCK=block, num_warps=_warps(block))
    return normed, out, scale


def rms_backward(grad: Tensor, normed: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x, in `dtype`."""
    grad, width = grad.contiguous(), normed.shape[-1]
    out = torch.empty(normed.shape, dtype=dtype, device=normed.device)
    block = triton.next_power_of_2(width)
    _rms_backward[(normed.numel() // width,)](
        grad, normed, weight, scale, out, width, BLOCK=block, num_warps=_warps(block)
    )
    return out


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _swiglu_forward[_grid(gate)](gate, up, out, gate.numel(), BLOCK=1024)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward[_grid(gate)](gate, up, grad, grad_gate, grad_up, gate.numel(), BLOCK=1024)
    return grad_gate, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x [B, T, heads, D]; cos and sin [B or 1, T, D], contiguous."""
    batch, length, heads, size = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    half = size // 2
    _rotate[(batch * length,)](
        x, cos, sin, out, length, cos.numel() // size, x.stride(0), x.stride(1), x.stride(2), sign,
        HEADS=heads, HALF=half,
        HEAD_BLOCK=triton.next_power_of_2(heads), HALF_BLOCK=triton.next_power_of_2(half),
    )  # fmt: skip
    return out


def unpack(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' packed NF4 and QuantState (blocks of 64) -> [out, in] in `dtype`: the values of dequantize_4bit."""
    assert state.blocksize == 64
    count = state.shape.numel()
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    blocks, nested = count // 64, bool(state.nested)
    second = state.state2 if nested else None
    if second is not None:
        assert second.blocksize == 256
    # fp32 products and sums are rounded one by one, as bitsandbytes' kernels do: no fused multiply-add.
    _unpack[(triton.cdiv(blocks, 32),)](
        packed, state.code, state.absmax,
        second.code if second is not None else state.code,
        second.absmax if second is not None else state.code,
        state.offset if second is not None else state.code,
        out, blocks, NESTED=nested, BLOCKS=32, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), 1024),)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
