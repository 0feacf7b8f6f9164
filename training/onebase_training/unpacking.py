"""Weights in a server's own layout -> the values that they stand for, one module at a time, when they are needed.

The layouts are the server's (kernels/cpu_ops.py, kernels/cuda_tiles.py); a test compares both sides bit for bit. On a
CPU the server's compiled library unpacks, on CUDA a Triton kernel; without Triton the tiles are put in rows again for
bitsandbytes' kernel.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase_training.cuda_choice import triton_unpack_for

BLOCK = 64


class Library:
    """`onebase_unpack` of a server's compiled kernels. Raises OSError or AttributeError if it isn't there."""

    def __init__(self, path: Path) -> None:
        self._unpack: Any = ctypes.CDLL(str(path)).onebase_unpack
        self._unpack.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 6, ctypes.c_void_p]
        self._unpack.restype = None

    def __call__(self, data: Tensor, code: Tensor, first: int, out: Tensor, *, amx: bool) -> None:
        rows, k = out.shape
        is_bf16 = int(out.dtype == torch.bfloat16)
        threads = torch.get_num_threads()
        self._unpack(data.data_ptr(), code.data_ptr(), first, rows, k, int(amx), is_bf16, threads, out.data_ptr())


@dataclass(frozen=True, slots=True)
class Strips:
    """Rows [first, first + shape[0]) of a fused projection in the CPU's layout, [strips, K / 64, 576] bytes."""

    library: Library
    data: Tensor
    code: Tensor
    first: int
    shape: tuple[int, int]
    amx: bool

    def __call__(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """[out, in] in bfloat16 or float32: code * absmax, rounded once."""
        out = torch.empty(self.shape, dtype=dtype) if out is None else out
        self.library(self.data, self.code, self.first, out, amx=self.amx)
        return out


@dataclass(frozen=True, slots=True)
class TiledRows:
    """As `Strips` in CUDA's layout, [rows / 64, blocks, 4, 576] bytes. `turn`: 0 or 1 where gate and up lie folded."""

    data: Tensor
    code: Tensor
    code_scale: float
    first: int
    shape: tuple[int, int]
    turn: int | None = None

    def __call__(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """[out, in]. absmax has been through a division, so a value may be 1 ulp of fp32 off before it is rounded."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        if (triton := triton_unpack_for(self.data)) is not None:
            found: Tensor = triton.unpack_tiles(
                self.data, self.code, self.code_scale, self.first, self.shape, self.turn, dtype, out
            )
            return found
        (n, k), quads = self.shape, self.data
        if self.turn is None:
            begin = self.first // 64
            quads, offset = quads[begin : (self.first + n + 63) // 64], self.first - begin * 64
            packed, absmax = (rows[offset : offset + n] for rows in rows_of(quads))
        else:
            packed, absmax = (_of_turn(rows, self.turn, n) for rows in rows_of(quads))
        state = QuantState(
            absmax=(absmax[:, : k // BLOCK] * self.code_scale).reshape(-1),
            shape=torch.Size(self.shape),
            code=self.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        values: Tensor = dequantize_4bit(packed[:, : k // 2].reshape(-1, 1), state)
        return values.view(self.shape) if out is None else out.copy_(values.view(self.shape))


def rows_of(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of the server's `repack`: bytes [rows, blocks * 32], high nibble first, and absmax [rows, blocks]."""
    quads, blocks = tiles.shape[:2]
    # quad, block, tile, g, t, half, s, h -> quad, tile, half, g, block, s, h, t
    nibbles = tiles[..., :512].reshape(quads, blocks, 4, 8, 4, 2, 4, 2).permute(0, 2, 5, 3, 1, 6, 7, 4)
    absmax = tiles[..., 512:].contiguous().view(torch.float32).view(quads, blocks, 4, 8, 2).permute(0, 2, 4, 3, 1)
    return nibbles.reshape(quads * 64, blocks * 32), absmax.reshape(quads * 64, blocks)


def _of_turn(rows: Tensor, turn: int, count: int) -> Tensor:
    """Gate (turn 0) or up (turn 1) out of rows that hold both in turns of eight."""
    return rows.view(-1, 8, rows.shape[1])[turn::2][: count // 8].reshape(count, rows.shape[1])
