"""The C++ CPU backend: repacks NF4 for it, multiplies, and carries the library that runs whole forwards.

A matmul here is a single call for tests and odd uses; serving runs `engine/cpu_forward.py`, one call a step. Operations
without a C++ version of their own are the torch twin's. It must not know sequences, adapters or requests.
"""

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from onebase_server.kernels import cpu_abi
from onebase_server.kernels.cpu_build import load_library
from onebase_server.kernels.ops import BLOCK, NF4Weight
from onebase_server.kernels.torch_ops import TorchKernels

STRIP = 16
"""Output features repacked together (cpu/common.h)."""


@dataclass(frozen=True, slots=True)
class Repacked:
    """Strips of 16 features: [ceil(N / 16), K / 64, 576] bytes of 16 absmax (fp32) and 512 bytes of nibbles."""

    data: Tensor
    amx: bool


class CpuKernels(TorchKernels):
    """`dtype` is the compute dtype: AMX serves bf16 only, and needs a layout of its own."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, *, amx: bool | None = None) -> None:
        self.library = cpu_abi.declare(library)
        has_amx = bool(library.onebase_enable_amx())
        self.amx = dtype == torch.bfloat16 and (has_amx if amx is None else amx and has_amx)

    def prepare(self, weight: NF4Weight) -> NF4Weight:
        """The repacked strips replace `packed` and `absmax`, so that the base is in memory once."""
        data = repack(weight, amx=self.amx)
        empty = weight.packed.new_empty(0)
        return replace(weight, packed=empty, absmax=empty.float(), repacked=Repacked(data, self.amx))

    def nf4_matmul(self, x: Tensor, weight: NF4Weight) -> Tensor:
        if not isinstance(weight.repacked, Repacked):
            return super().nf4_matmul(x, weight)
        n, k = weight.shape
        rows = x.contiguous() if self.amx else x.float().contiguous()
        out = torch.empty(x.shape[0], (-(-n // STRIP) + 1) * STRIP)  # row_stride of cpu/model.h
        scratch = torch.empty(2 * k * STRIP * 2 + (BLOCK + x.shape[0]) * STRIP * 4 + 16384, dtype=torch.uint8)
        linear = cpu_abi.Linear(data=weight.repacked.data.data_ptr(), n=n, k=k, slices=1)
        self.library.onebase_nf4_matmul(
            ctypes.byref(linear),
            weight.code.data_ptr(),
            rows.data_ptr(),
            x.shape[0],
            int(self.amx),
            int(x.dtype == torch.bfloat16),
            scratch.data_ptr(),
            out.data_ptr(),
        )
        return out[:, :n].to(x.dtype)


def cpu_kernels(cache: Path, dtype: torch.dtype) -> CpuKernels | None:
    """The C++ kernels for this machine, or None (with a warning logged) when they can't be built."""
    library = load_library(cache)
    return None if library is None else CpuKernels(library, dtype)


def repack(weight: NF4Weight, *, amx: bool) -> Tensor:
    """[strips, K / 64, 576] uint8. Missing features of the last strip get an absmax of 0."""
    n, k = weight.shape
    strips, blocks = -(-n // STRIP), k // BLOCK
    codes = torch.stack((weight.packed >> 4, weight.packed & 0xF), dim=-1).view(n, k)
    padding = strips * STRIP - n
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding)).view(strips, STRIP, blocks, BLOCK)
    absmax = torch.nn.functional.pad(weight.absmax, (0, 0, 0, padding))
    scales = absmax.view(strips, STRIP, blocks).transpose(1, 2).contiguous()
    nibbles = _amx_nibbles(codes) if amx else _wide_nibbles(codes)
    head = scales.view(torch.uint8).view(strips, blocks, 4 * STRIP)
    return torch.cat((head, nibbles), dim=-1).contiguous()


def _amx_nibbles(codes: Tensor) -> Tensor:
    """A 16-bit word j of a pair of features: k = j and k = 32 + j of the even one, then of the odd one."""
    strips, _, blocks, _ = codes.shape
    pairs = codes.view(strips, 8, 2, blocks, 2, 32).permute(0, 3, 1, 5, 2, 4)  # [.., pair, j, feature, half]
    return (pairs[..., 0] | pairs[..., 1] << 4).reshape(strips, blocks, 8 * BLOCK)


def _wide_nibbles(codes: Tensor) -> Tensor:
    """A 32-bit word of feature f in group c: k = 8c .. 8c + 7, lowest nibble first."""
    strips, _, blocks, _ = codes.shape
    groups = codes.view(strips, STRIP, blocks, 8, 4, 2).permute(0, 2, 3, 1, 4, 5)  # [.., c, feature, byte, nibble]
    return (groups[..., 0] | groups[..., 1] << 4).reshape(strips, blocks, 8 * BLOCK)
