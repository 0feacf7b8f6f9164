"""LoRA's passes over the activations on CUDA, in Triton: dropout and shrink in one, and both ways back in one.

No dropout mask is ever in memory: each pass draws it anew from (seed, place), Philox of 7 rounds (Salmon et al., 2011),
one 16-bit number a value and module. Twins of the plain torch in layer_ops.py. Import only where Triton is:
cuda_choice.py decides. Knows no model.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MODULES = 3
"""At most so many linears read the same rows: q, k and v."""


@triton.jit
def _kept(rows, bits, threshold):  # type: ignore[no-untyped-def]
    """`rows` [T, K] where this module's bits [T, K / 2] let them through, else 0."""
    wide = bits.to(tl.uint32, bitcast=True)
    draw = tl.interleave((wide & 0xFFFF).to(tl.int32), (wide >> 16).to(tl.int32))
    return tl.where(draw >= threshold, rows, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    x, a, low, seed, tokens, width, stride, threshold, scale0, scale1, scale2,
    MODULES: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token, rank = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    sum0 = tl.zeros([TOKENS, RANK], tl.float32)
    sum1 = tl.zeros([TOKENS, RANK], tl.float32)
    sum2 = tl.zeros([TOKENS, RANK], tl.float32)
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        inside = (token < tokens)[:, None] & (at < width)[None, :]
        rows = tl.load(x + token.to(tl.int64)[:, None] * stride + at[None, :], mask=inside, other=0.0)
        row0, row1, row2 = rows, rows, rows
        if DROPS:
            pair = start // 2 + tl.arange(0, WIDTH // 2)
            bits0, bits1, bits2, _ = tl.randint4x(seed, token[:, None] * (width // 2) + pair[None, :], 7)
            row0, row1, row2 = (
                _kept(rows, bits0, threshold),
                _kept(rows, bits1, threshold),
                _kept(rows, bits2, threshold),
            )
        place = rank[None, :] * width + at[:, None]
        held = (at < width)[:, None]
        sum0 = tl.dot(row0, tl.load(a + place, mask=held, other=0.0), sum0, input_precision=PRECISION)
        if MODULES > 1:
            second = tl.load(a + RANK * width + place, mask=held, other=0.0)
            sum1 = tl.dot(row1, second, sum1, input_precision=PRECISION)
        if MODULES > 2:
            third = tl.load(a + 2 * RANK * width + place, mask=held, other=0.0)
            sum2 = tl.dot(row2, third, sum2, input_precision=PRECISION)
    target = low + token.to(tl.int64)[:, None] * (MODULES * RANK) + rank[None, :]
    there = (token < tokens)[:, None]
    tl.store(target, (sum0 * scale0).to(low.dtype.element_ty), mask=there)
    if MODULES > 1:
        tl.store(target + RANK, (sum1 * scale1).to(low.dtype.element_ty), mask=there)
    if MODULES > 2:
        tl.store(target + 2 * RANK, (sum2 * scale2).to(low.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _back(  # type: ignore[no-untyped-def]
    grad_x, x, gain, grad_low, a, parts, seed, tokens, width, stride, threshold, scale0, scale1, scale2, chunk,
    GAIN: tl.constexpr, NEEDS_X: tl.constexpr, MODULES: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A strip of columns for `chunk` tokens: adds the adapters' share to grad_x, sums up a part of A's gradient."""
    at, rank = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, RANK)
    columns = (at < width)[None, :]
    place = rank[:, None] * width + at[None, :]
    a0 = tl.load(a + place, mask=columns, other=0.0)
    a1, a2 = a0, a0
    if MODULES > 1:
        a1 = tl.load(a + RANK * width + place, mask=columns, other=0.0)
    if MODULES > 2:
        a2 = tl.load(a + 2 * RANK * width + place, mask=columns, other=0.0)
    sum0 = tl.zeros([RANK, WIDTH], tl.float32)
    sum1 = tl.zeros([RANK, WIDTH], tl.float32)
    sum2 = tl.zeros([RANK, WIDTH], tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, first + chunk, TOKENS):
        token = start + tl.arange(0, TOKENS)
        here = (token < tokens)[:, None]
        inside = here & columns
        rows = tl.load(x + token.to(tl.int64)[:, None] * stride + at[None, :], mask=inside, other=0.0)
        if GAIN:
            factor = tl.load(gain + at, mask=at < width, other=0.0).to(tl.float32)
            rows = (rows.to(tl.float32) * factor[None, :]).to(x.dtype.element_ty)
        row0, row1, row2 = rows, rows, rows
        lows = grad_low + token.to(tl.int64)[:, None] * (MODULES * RANK) + rank[None, :]
        low0 = tl.load(lows, mask=here, other=0.0)
        share0 = tl.dot(low0, a0, input_precision=PRECISION)
        low1, low2, share1, share2 = low0, low0, share0, share0
        if MODULES > 1:
            low1 = tl.load(lows + RANK, mask=here, other=0.0)
            share1 = tl.dot(low1, a1, input_precision=PRECISION)
        if MODULES > 2:
            low2 = tl.load(lows + 2 * RANK, mask=here, other=0.0)
            share2 = tl.dot(low2, a2, input_precision=PRECISION)
        if DROPS:
            pair = tl.program_id(0) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
            bits0, bits1, bits2, _ = tl.randint4x(seed, token[:, None] * (width // 2) + pair[None, :], 7)
            row0, row1, row2 = (
                _kept(rows, bits0, threshold),
                _kept(rows, bits1, threshold),
                _kept(rows, bits2, threshold),
            )
            share0 = _kept(share0, bits0, threshold)
            share1 = _kept(share1, bits1, threshold)
            share2 = _kept(share2, bits2, threshold)
        sum0 = tl.dot(tl.trans(low0), row0, sum0, input_precision=PRECISION)
        share0 *= scale0
        if MODULES > 1:
            sum1 = tl.dot(tl.trans(low1), row1, sum1, input_precision=PRECISION)
            share0 += share1 * scale1
        if MODULES > 2:
            sum2 = tl.dot(tl.trans(low2), row2, sum2, input_precision=PRECISION)
            share0 += share2 * scale2
        if NEEDS_X:
            target = grad_x + token.to(tl.int64)[:, None] * width + at[None, :]
            total = tl.load(target, mask=inside, other=0.0).to(tl.float32) + share0
            tl.store(target, total.to(grad_x.dtype.element_ty), mask=inside)
    out = parts + tl.program_id(1).to(tl.int64) * (MODULES * RANK) * width + place
    tl.store(out, sum0 * scale0, mask=columns)
    if MODULES > 1:
        tl.store(out + RANK * width, sum1 * scale1, mask=columns)
    if MODULES > 2:
        tl.store(out + 2 * RANK * width, sum2 * scale2, mask=columns)


def shrink(x: Tensor, a: Tensor, scales: Sequence[float], dropout: float, seed: int) -> Tensor:
    """x [T, K], a [modules, R, K] -> [T, modules * R]: scale * dropout(x) A^T a module, in x's dtype."""
    (tokens, width), (modules, rank, _) = x.shape, a.shape
    assert modules <= MODULES
    assert width % 2 == 0
    assert x.stride(1) == 1
    assert a.is_contiguous()
    low = torch.empty(tokens, modules * rank, dtype=x.dtype, device=x.device)
    threshold, factors = _drawn(scales, dropout)
    block = 32 if tokens > 2048 else 16
    _shrink[(triton.cdiv(tokens, block),)](
        x, a, low, seed, tokens, width, x.stride(0), threshold, *factors,
        MODULES=modules, RANK=rank, TOKENS=block, WIDTH=128 if rank <= 64 else 64, DROPS=dropout > 0,
        PRECISION=_precision(x), num_warps=4,
    )  # fmt: skip
    return low


def back(
    grad_x: Tensor | None,
    x: Tensor,
    gain: Tensor | None,
    grad_low: Tensor,
    a: Tensor,
    scales: Sequence[float],
    dropout: float,
    seed: int,
) -> Tensor:
    """A's gradient [modules * R, K] in fp32; the adapters' share is added to grad_x [T, K] where it lies.

    The rows that `shrink` saw are x [T, K], times `gain` [K] where given. grad_low [T, modules * R].
    """
    (tokens, width), (modules, rank, _) = x.shape, a.shape
    assert x.stride(1) == 1
    assert grad_low.is_contiguous()
    assert grad_x is None or grad_x.is_contiguous()
    strip = 128 if rank <= 32 else 64
    chunk = 256 if tokens > 2048 else 128
    chunks = triton.cdiv(tokens, chunk)
    parts = torch.empty(chunks, modules * rank, width, dtype=torch.float32, device=x.device)
    threshold, factors = _drawn(scales, dropout)
    _back[(triton.cdiv(width, strip), chunks)](
        grad_x if grad_x is not None else x, x, gain if gain is not None else x, grad_low, a, parts, seed, tokens,
        width, x.stride(0), threshold, *factors, chunk,
        GAIN=gain is not None, NEEDS_X=grad_x is not None, MODULES=modules, RANK=rank, TOKENS=32, WIDTH=strip,
        DROPS=dropout > 0, PRECISION=_precision(x), num_warps=4 if rank <= 32 else 8,
    )  # fmt: skip
    return parts.sum(0)


def _drawn(scales: Sequence[float], dropout: float) -> tuple[int, list[float]]:
    """The 16-bit threshold below which a value is dropped, and the factors with what is kept made larger for it."""
    threshold = round(dropout * 65536)
    larger = 65536 / (65536 - threshold)
    return threshold, [scale * larger for scale in scales] + [0.0] * (MODULES - len(scales))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
