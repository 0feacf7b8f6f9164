"""NF4 -> values on CUDA, in Triton: bitsandbytes' own layout, and a server's tiles (unpacking.py says what those are).

Bit for bit bitsandbytes' dequantisation (tests/gpu/test_training_ops.py). Import only where Triton is: cuda_choice.py
decides. Knows no model.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_tiles(  # type: ignore[no-untyped-def]
    tiles, code, code_scale, out, first, count, blocks, used,
    TURN: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows, `BLOCKS` blocks of 64 columns. A quad is 64 rows of the projection, a tile 16 of them, a half 8."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = first + row if TURN < 0 else row // 8 * 16 + TURN * 8 + row % 8
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    quad, tile, half, g = at // 64, at % 64 // 16, at % 16 // 8, at % 8
    start = (quad[:, None].to(tl.int64) * blocks + block[None, :]) * 4 + tile[:, None]
    inside = (row < count)[:, None] & (block < used)[None, :]
    base = start * 576
    scales = (tiles + base + 512 + (g * 2 + half)[:, None] * 4).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales, mask=inside, other=0.0) * code_scale
    byte = tl.arange(0, 32)  # of a row's block: s, h, t
    within = (byte % 4) * 16 + (byte // 8) * 2 + byte // 4 % 2
    place = (g * 64 + half * 8)[:, None, None] + within[None, None, :]
    pair = tl.load(tiles + base[:, :, None] + place, mask=inside[:, :, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, :, None]
    low = tl.load(code + (pair & 15)) * scale[:, :, None]
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    column = block[None, :, None] * 64 + tl.arange(0, 64)[None, None, :]
    target = out + row.to(tl.int64)[:, None, None] * (used * 64) + column
    tl.store(target, values, mask=inside[:, :, None])


def unpack(packed: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """bitsandbytes' packed NF4 and QuantState (blocks of 64) -> [out, in] in `dtype`: the values of dequantize_4bit."""
    assert state.blocksize == 64
    count = state.shape.numel()
    out = torch.empty(state.shape, dtype=dtype, device=packed.device) if out is None else out
    assert out.is_contiguous()
    assert out.numel() == count
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


def unpack_tiles(
    tiles: Tensor,
    code: Tensor,
    code_scale: float,
    first: int,
    shape: tuple[int, int],
    turn: int | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of a server's tiles [quads, blocks, 4, 576] -> `shape` in `dtype`. See unpacking.TiledRows."""
    rows, width = shape
    out = torch.empty(shape, dtype=dtype, device=tiles.device) if out is None else out
    blocks, used = tiles.shape[1], width // 64  # the tiles' blocks are padded
    assert out.is_contiguous()
    assert tiles.is_contiguous()
    assert width == used * 64 <= blocks * 64
    _unpack_tiles[(triton.cdiv(rows, 16), triton.cdiv(used, 4))](
        tiles, code, code_scale, out, first, rows, blocks, used,
        TURN=-1 if turn is None else turn, ROWS=16, BLOCKS=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
