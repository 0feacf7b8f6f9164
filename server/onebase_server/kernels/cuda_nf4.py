"""NF4 matmuls on CUDA: the tile layout made at load, the choice of a kernel variant by shape, and the launches.

Variants are instances of the two kernels in cuda/nf4.cu. Above `MAX_TOKENS` tokens the weight is dequantised into
a scratch buffer and cuBLAS multiplies. It must not know models, layers or LoRA.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onebase_server.kernels.cuda_build import CudaModule, is_hopper, pointer, read_source, tensor_map
from onebase_server.kernels.cuda_dispatch import Choice, measured_choice
from onebase_server.kernels.ops import BLOCK, NF4Weight

CODE_SCALE = 1.43701171875
"""The 16 codes are kept as bf16(code * CODE_SCALE) and absmax / CODE_SCALE: this factor makes the rounding of the codes
smallest (rms 0.06 % instead of 0.11 %), found by trying all multiples of 1/4096 in [1, 2)."""

_TILE_BYTES, _TABLE_BYTES = 576, 65536
_ROWS_MULTIPLE = 64
_BLOCKS_MULTIPLE = 4  # the wide kernels take up to four blocks of K a step

Codes = ctypes.c_uint16 * 16


@dataclass(frozen=True, slots=True)
class Small:
    """`small_kernel<W, D>`: W warps split K, D pairs of tiles in each warp's ring."""

    warps: int
    depth: int

    @property
    def name(self) -> str:
        return f"nf4_small_{self.warps}_{self.depth}"

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def source(self) -> str:
        return f"SMALL({self.name}, {self.warps}, {self.depth})"

    def shared_bytes(self, m: int, blocks: int) -> int:
        ring = self.warps * self.depth * 2 * _TILE_BYTES
        return _TABLE_BYTES + ring + 2 * self.warps * 16 * m * 4 + m * (blocks * 128 + 16)


@dataclass(frozen=True, slots=True)
class Wide:
    """`wide_kernel<NT, R, WN, WK, D>`: up to 8 NT tokens, 16 R WN rows and 64 WK columns a step, D steps."""

    token_tiles: int
    row_tiles: int
    row_warps: int
    k_warps: int
    depth: int

    @property
    def name(self) -> str:
        return f"nf4_wide_{self.token_tiles}_{self.row_tiles}_{self.row_warps}_{self.k_warps}_{self.depth}"

    @property
    def threads(self) -> int:
        return self.row_warps * self.k_warps * 32

    @property
    def rows(self) -> int:
        return self.row_warps * self.row_tiles * 16

    @property
    def stage_blocks(self) -> int:
        return self.k_warps

    @property
    def source(self) -> str:
        sizes = f"{self.token_tiles}, {self.row_tiles}, {self.row_warps}, {self.k_warps}, {self.depth}"
        return f"WIDE({self.name}, {sizes})"

    @property
    def shared_bytes(self) -> int:
        x = self.k_warps * self.token_tiles * 8 * 144
        weights = self.row_warps * self.k_warps * self.row_tiles * _TILE_BYTES
        sums = self.row_tiles * self.token_tiles * 4 * self.row_warps * 32 * 4 if self.k_warps > 1 else 0
        return _TABLE_BYTES + self.depth * (x + weights) + 16 + sums

    @property
    def partial_floats(self) -> int:
        """Of one CTA: it shares at most two row blocks with others."""
        return 2 * self.rows * self.token_tiles * 8


@dataclass(frozen=True, slots=True)
class Group:
    """`wg_kernel<N, WR, WK, B, D>` (Hopper): up to N tokens, 64 WR rows and 64 WK B columns a stage, D stages."""

    tokens: int
    row_groups: int
    k_groups: int
    blocks: int
    depth: int

    @property
    def name(self) -> str:
        return f"nf4_wg_{self.tokens}_{self.row_groups}_{self.k_groups}_{self.blocks}_{self.depth}"

    @property
    def threads(self) -> int:
        return (self.row_groups * self.k_groups + 1) * 128

    @property
    def rows(self) -> int:
        return self.row_groups * 64

    @property
    def stage_blocks(self) -> int:
        return self.k_groups * self.blocks

    @property
    def source(self) -> str:
        sizes = f"{self.tokens}, {self.row_groups}, {self.k_groups}, {self.blocks}, {self.depth}"
        return f"WG({self.name}, {sizes})"

    @property
    def shared_bytes(self) -> int:
        stage = self.stage_blocks * (self.tokens * 128 + self.row_groups * 4 * _TILE_BYTES)
        sums = self.rows * self.tokens * 4 if self.k_groups > 1 else 0
        return _TABLE_BYTES + self.depth * (-(-stage // 1024) * 1024) + 1024 + sums

    @property
    def partial_floats(self) -> int:
        """Of one CTA."""
        return self.rows * self.tokens


Variant = Small | Wide | Group

SMALL: dict[str, Variant] = {"small": Small(8, 8), "small16": Small(16, 3)}
WIDE: dict[str, Variant] = {
    "wide8": Wide(1, 2, 4, 4, 6),
    "wide16": Wide(2, 2, 4, 4, 5),
    "wide32": Wide(4, 2, 4, 4, 4),
    "wide64": Wide(8, 2, 4, 2, 4),
    "wide128": Wide(16, 2, 8, 1, 4),
}
"""Tensor cores of any generation since Ampere."""
GROUP: dict[str, Variant] = {
    "wg8": Group(8, 2, 2, 2, 5),
    "wg16": Group(16, 2, 2, 2, 5),
    "wg32": Group(32, 2, 2, 2, 4),
    "wg48": Group(48, 3, 1, 2, 5),
    "wg64": Group(64, 2, 1, 2, 6),
    "wg64_tall": Group(64, 3, 1, 2, 5),
    "wg96": Group(96, 2, 1, 2, 4),
    "wg128": Group(128, 2, 1, 2, 3),
}
"""Hopper."""
MAX_TOKENS = 128
_MAX_ROW_BLOCKS = 65536


@dataclass(frozen=True, slots=True)
class Tiles:
    """`NF4Weight.repacked` of this backend."""

    data: Tensor  # uint8 [rows / 64, blocks, 4, 576]
    blocks: int
    row_tiles: int
    codes: "ctypes.Array[ctypes.c_uint16]"  # bf16(code * CODE_SCALE)
    exact_code: Tensor  # the same in fp32


def supports(weight: NF4Weight) -> bool:
    n, k = weight.shape
    return n % 8 == 0 and k % BLOCK == 0 and weight.packed.is_cuda


def repack(weight: NF4Weight) -> Tiles:
    """Row-major nibbles and absmax -> tiles (see cuda/nf4.cu). Rows and blocks that pad have absmax 0."""
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


class NF4Matmul:
    """Launches. One object a device: it owns the split-K workspace, so use it on one stream at a time."""

    def __init__(self, cache_dir: Path | None = None, extra: dict[str, Variant] | None = None) -> None:
        self.variants: dict[str, Variant] = {**SMALL, **(GROUP if is_hopper() else WIDE), **(extra or {})}
        lines = [v.source for v in self.variants.values()]
        source = read_source("wgmma.cuh", "nf4.cu", extra=lines)
        self._module = CudaModule(source, defines=["-DHOPPER"] if is_hopper() else [], cache_dir=cache_dir)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._processors = properties.multi_processor_count
        self._shared_limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        floats = max(v.partial_floats for v in self.variants.values() if not isinstance(v, Small)) * self._processors
        self._workspace = torch.empty(floats, dtype=torch.float32, device="cuda")
        self._counters = torch.zeros(_MAX_ROW_BLOCKS, dtype=torch.int32, device="cuda")
        self._flags = torch.zeros(self._processors, dtype=torch.int32, device="cuda")
        self._gpu = properties.name

    def __call__(self, x: Tensor, weight: NF4Weight) -> Tensor:
        tiles = weight.repacked
        assert isinstance(tiles, Tiles)
        m, (n, k) = x.shape[0], weight.shape
        choice = self.choose(m, n, k, tiles.blocks)
        if choice == "dequantise":
            return functional.linear(x, self.dequantise(weight))
        return self.run(choice, x, weight)

    def choose(self, m: int, n: int, k: int, blocks: int) -> Choice:
        """The measured table of this GPU first, else the rule of thumb: the smallest variant that holds m tokens."""
        if m > MAX_TOKENS:
            return "dequantise"
        choice = measured_choice(self._gpu, m, n, k)
        if choice and self.fits(choice, m, blocks):
            return choice
        for name in self.variants:
            if self.fits(name, m, blocks):
                return name
        return "dequantise"

    def fits(self, name: str, m: int, blocks: int) -> bool:
        variant = self.variants[name]
        if isinstance(variant, Small):
            return m <= 8 and variant.shared_bytes(m, blocks) <= self._shared_limit
        tokens = variant.tokens if isinstance(variant, Group) else 8 * variant.token_tiles
        return m <= tokens and variant.shared_bytes <= self._shared_limit

    def run(self, name: str, x: Tensor, weight: NF4Weight, out: Tensor | None = None) -> Tensor:
        """One kernel by name. x [M, K] bf16, rows contiguous and aligned to 16 bytes."""
        tiles, variant = weight.repacked, self.variants[name]
        assert isinstance(tiles, Tiles)
        assert x.dtype == torch.bfloat16
        assert x.stride(1) == 1
        assert not x.stride(0) % 8
        assert not x.data_ptr() % 16
        m, (n, k) = x.shape[0], weight.shape
        y = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
        sizes = [ctypes.c_int(v) for v in (m, n, k, x.stride(0), tiles.blocks, tiles.row_tiles)]
        head: list[Any] = [pointer(tiles.data), pointer(x), pointer(y), tiles.codes]
        function = self._module.function(variant.name)
        if isinstance(variant, Small):
            grid = min(self._processors, tiles.row_tiles)
            shared = variant.shared_bytes(m, tiles.blocks)
            function.launch((grid, 1, 1), variant.threads, [*head, *sizes], shared_bytes=shared)
            return y
        row_blocks = -(-tiles.row_tiles * 16 // variant.rows)
        grid = min(self._processors, row_blocks * tiles.blocks // variant.stage_blocks)
        if isinstance(variant, Group):
            head[1] = tensor_map(x, variant.tokens)
            del sizes[2:4]  # K and the stride are in the map
        counters = self._flags if isinstance(variant, Group) else self._counters
        arguments = [*head, pointer(self._workspace), pointer(counters), *sizes]
        function.launch((grid, 1, 1), variant.threads, arguments, shared_bytes=variant.shared_bytes)
        return y

    def dequantise(self, weight: NF4Weight, out: Tensor | None = None) -> Tensor:
        """bf16 [N, K]: bitsandbytes' values, but for absmax having been through a multiplication (1 ulp of fp32)."""
        tiles = weight.repacked
        assert isinstance(tiles, Tiles)
        n, k = weight.shape
        dense = torch.empty(n, k, dtype=torch.bfloat16, device=tiles.data.device) if out is None else out
        padded = tiles.data.shape[0] * 4
        sizes = [ctypes.c_int(v) for v in (n, k, tiles.blocks, padded)]
        grid = min(self._processors * 8, -(-padded * tiles.blocks // 8))
        arguments = [pointer(tiles.data), pointer(dense), pointer(tiles.exact_code), *sizes]
        self._module.function("nf4_dequantise").launch((grid, 1, 1), 256, arguments)
        return dense
