"""The tile layout of NF4 weights on CUDA (see cuda/nf4.cuh), made once at load by plain torch. Nothing is launched."""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from onebase_server.kernels.ops import BLOCK, NF4Weight

CODE_SCALE = 1.43701171875
"""The 16 codes are kept as bf16(code * CODE_SCALE) and absmax / CODE_SCALE: this factor makes the rounding of the codes
smallest (rms 0.06 % instead of 0.11 %), found by trying all multiples of 1/4096 in [1, 2)."""

_TILE_BYTES = 576
_ROWS_MULTIPLE = 64
_BLOCKS_MULTIPLE = 4  # kernels take up to four blocks of K a step

Codes = ctypes.c_uint16 * 16


@dataclass(frozen=True, slots=True)
class Tiles:
    """`NF4Weight.repacked` of this backend."""

    data: Tensor  # uint8 [rows / 64, blocks, 4, 576]
    blocks: int
    row_tiles: int
    codes: "ctypes.Array[ctypes.c_uint16]"  # bf16(code * CODE_SCALE)
    exact_code: Tensor  # the same in fp32
    folded: bool = False
    """Rows are gate and up of a fused gate_up projection in turns of eight."""


def supports(weight: NF4Weight) -> bool:
    n, k = weight.shape
    return n % 8 == 0 and k % BLOCK == 0 and weight.packed.is_cuda


def repack(weight: NF4Weight) -> Tiles:
    """Row-major nibbles and absmax -> tiles (see cuda/nf4.cuh). Rows and blocks that pad have absmax 0."""
    n, k = weight.shape
    rows = -(-n // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    blocks = -(-k // BLOCK // _BLOCKS_MULTIPLE) * _BLOCKS_MULTIPLE
    packed = functional.pad(weight.packed.view(n, k // 2), (0, blocks * 32 - k // 2, 0, rows - n), value=0x77)
    packed = packed.view(rows // 64, 4, 2, 8, blocks, 4, 2, 4)  # quad, tile, half, g, block, s, h, t
    absmax = functional.pad(weight.absmax / CODE_SCALE, (0, blocks - k // BLOCK, 0, rows - n))
    absmax = absmax.view(rows // 64, 4, 2, 8, blocks).permute(0, 4, 1, 3, 2).contiguous()  # quad, block, tile, g, half
    tiles = torch.empty(rows // 64, blocks, 4, _TILE_BYTES, dtype=torch.uint8, device=packed.device)
    nibbles = packed.permute(0, 4, 1, 3, 7, 2, 5, 6)  # quad, block, tile, g, t, half, s, h
    tiles[..., :512] = nibbles.reshape(rows // 64, blocks, 4, 512)
    tiles[..., 512:] = absmax.view(rows // 64, blocks, 4, 16).view(torch.uint8)
    exact = (weight.code.double() * CODE_SCALE).float()
    codes = Codes(*[v & 0xFFFF for v in exact.to(torch.bfloat16).view(torch.int16).tolist()])
    return Tiles(tiles, blocks, -(-n // 16), codes, exact)


def fold(tiles: Tiles, rows: int) -> Tiles:
    """Rows [gate, up] -> gate and up in turns of eight, so that a tile holds both of eight columns of the product.
    `rows` = 2 F, F a multiple of 8."""
    data = tiles.data
    quads, blocks = data.shape[:2]
    pairs = torch.arange(rows // 16, device=data.device)
    source = torch.stack((pairs, pairs + rows // 16), 1).flatten()  # half tile (8 rows) of each new half tile
    source = functional.pad(source, (0, quads * 8 - len(source)), value=quads * 8 - 1)
    nibbles = data[..., :512].view(quads, blocks, 4, 32, 2, 8).permute(0, 2, 4, 1, 3, 5)
    scales = data[..., 512:].view(quads, blocks, 4, 8, 2, 4).permute(0, 2, 4, 1, 3, 5)
    out = torch.empty_like(data)
    moved = nibbles.reshape(quads * 8, blocks, 32, 8)[source].view(quads, 4, 2, blocks, 32, 8)
    out[..., :512] = moved.permute(0, 3, 1, 4, 2, 5).reshape(quads, blocks, 4, 512)
    moved = scales.reshape(quads * 8, blocks, 8, 4)[source].view(quads, 4, 2, blocks, 8, 4)
    out[..., 512:] = moved.permute(0, 3, 1, 4, 2, 5).reshape(quads, blocks, 4, 64)
    return replace(tiles, data=out, folded=True)
