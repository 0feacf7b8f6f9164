"""NF4 matmuls on CUDA: the choice of a kernel variant by shape, and the launches.

Up to `MAX_TOKENS` tokens a kernel reads the tiles; above, the weight is dequantised into a scratch buffer and cuBLAS
multiplies. It must not know models, layers or LoRA.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onebase_server.kernels.cuda_build import (
    CudaFunction,
    CudaModule,
    is_hopper,
    pointer,
    read_source,
    tensor_map,
)
from onebase_server.kernels.cuda_dispatch import Choice, measured_choice
from onebase_server.kernels.cuda_tiles import Tiles
from onebase_server.kernels.cuda_variants import GROUP, MAX_TOKENS, SMALL, WIDE, Group, Small, Variant
from onebase_server.kernels.ops import NF4Weight

SOURCE_FILES = ("wgmma.cuh", "nf4.cuh", "nf4_small.cuh", "nf4_wide.cuh", "nf4_hopper.cuh", "nf4_dequantise.cuh")
_MAX_ROW_BLOCKS = 65536


class Fusion(ctypes.Structure):
    """What a matmul does besides: see `Fusion` in cuda/nf4.cuh."""

    _fields_ = (
        ("residual", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("swiglu", ctypes.c_int),
    )


NO_FUSION = Fusion()


@dataclass(frozen=True, slots=True)
class Plan:
    """One variant for one shape."""

    variant: Variant
    function: CudaFunction
    grid: tuple[int, int, int]
    shared_bytes: int


class NF4Matmul:
    """Launches. One object a device: it owns the split-K workspace, so use it on one stream at a time."""

    def __init__(self, cache_dir: Path | None = None, extra: dict[str, Variant] | None = None) -> None:
        self.variants: dict[str, Variant] = {**SMALL, **(GROUP if is_hopper() else WIDE), **(extra or {})}
        lines = list(dict.fromkeys(v.source for v in self.variants.values()))
        source = read_source(*SOURCE_FILES, extra=lines)
        self._module = CudaModule(source, defines=["-DHOPPER"] if is_hopper() else [], cache_dir=cache_dir)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._processors = properties.multi_processor_count
        self._shared_limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        floats = max(v.partial_floats for v in self.variants.values() if not isinstance(v, Small)) * self._processors
        self._workspace = torch.empty(floats, dtype=torch.float32, device="cuda")
        self._counters = torch.zeros(_MAX_ROW_BLOCKS, dtype=torch.int32, device="cuda")
        self._flags = torch.zeros(self._processors, dtype=torch.int32, device="cuda")
        self._gpu = properties.name
        self._plans: dict[tuple[str, int, int, int], Plan] = {}
        self._choices: dict[tuple[int, int, int], Choice] = {}

    def __call__(self, x: Tensor, weight: NF4Weight) -> Tensor:
        tiles = weight.repacked
        assert isinstance(tiles, Tiles)
        m, (n, k) = x.shape[0], weight.shape
        choice = self.choose(m, n, k, tiles.blocks)
        if choice == "dequantise":
            return functional.linear(x, self.dequantise(weight))
        return self.run(choice, x, weight)

    def in_halves(self, x: Tensor, weight: NF4Weight) -> Tensor:
        """For up to twice `MAX_TOKENS`: two launches read the tiles twice, which still beats dequantising them."""
        m, (n, k) = x.shape[0], weight.shape
        assert isinstance(weight.repacked, Tiles)
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        half = -(-m // 16) * 8
        choice = self.choose(half, n, k, weight.repacked.blocks)
        for part in (slice(0, half), slice(half, m)):
            self.run(choice, x[part], weight, y[part])
        return y

    def choose(self, m: int, n: int, k: int, blocks: int) -> Choice:
        """The measured table of this GPU first, else the rule of thumb: the smallest variant that holds m tokens."""
        if m > MAX_TOKENS:
            return "dequantise"
        if (m, n, k) not in self._choices:
            self._choices[m, n, k] = self._choose(m, n, k, blocks)
        return self._choices[m, n, k]

    def _choose(self, m: int, n: int, k: int, blocks: int) -> Choice:
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

    def covers(self, weight: NF4Weight) -> bool:
        """Whether this GPU's shared memory holds a kernel for every number of tokens up to `MAX_TOKENS`."""
        blocks = -(-weight.shape[1] // 256) * 4
        return all(any(self.fits(name, m, blocks) for name in self.variants) for m in (1, MAX_TOKENS))

    def can_fuse(self, m: int, weight: NF4Weight) -> bool:
        """Whether `run` takes a fusion with swiglu for that many tokens."""
        return isinstance(self._variant(m, weight), Small | Group)

    def can_fuse_norm(self, m: int, weight: NF4Weight) -> bool:
        """Every CTA repeats the norm, which pays for one token only (measured: at eight it costs 11 us a matmul)."""
        return m == 1 and weight.shape[1] <= 8192 and isinstance(self._variant(m, weight), Small)

    def _variant(self, m: int, weight: NF4Weight) -> Variant | None:
        assert isinstance(weight.repacked, Tiles)
        return self.variants.get(self.choose(m, *weight.shape, weight.repacked.blocks))

    def fused(self, x: Tensor, weight: NF4Weight, fusion: Fusion) -> Tensor:
        """As calling the object, with `fusion`; only where `can_fuse` says so."""
        tiles, (n, k) = weight.repacked, weight.shape
        assert isinstance(tiles, Tiles)
        width = n // 2 if fusion.swiglu else n
        out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
        return self.run(self.choose(x.shape[0], n, k, tiles.blocks), x, weight, out, fusion)

    def run(
        self, name: str, x: Tensor, weight: NF4Weight, out: Tensor | None = None, fusion: Fusion = NO_FUSION
    ) -> Tensor:
        """One kernel by name. x [M, K] bf16, rows contiguous and aligned to 16 bytes."""
        tiles = weight.repacked
        assert isinstance(tiles, Tiles)
        assert x.dtype == torch.bfloat16
        assert x.stride(1) == 1
        assert not x.stride(0) % 8
        assert not x.data_ptr() % 16
        m, (n, k) = x.shape[0], weight.shape
        y = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
        plan = self._plans.get((name, m, n, k)) or self._plan(name, m, n, k, tiles)
        variant = plan.variant
        head: list[Any] = [pointer(tiles.data), pointer(x), pointer(y), tiles.codes]
        sizes = [m, n, k, x.stride(0), tiles.blocks, tiles.row_tiles]
        if isinstance(variant, Small):
            assert m == 1 or not fusion.gain
            tail: list[Any] = [fusion]
        else:
            assert not fusion.gain
            tail = [pointer(self._workspace), pointer(self._flags if isinstance(variant, Group) else self._counters)]
        if isinstance(variant, Group):
            head[1] = tensor_map(x, variant.tokens)
            sizes = [m, n, tiles.blocks, tiles.row_tiles, fusion.swiglu]  # K and the stride are in the map
        plan.function.launch(plan.grid, variant.threads, [*head, *tail, *sizes], shared_bytes=plan.shared_bytes)
        return y

    def _plan(self, name: str, m: int, n: int, k: int, tiles: Tiles) -> Plan:
        variant = self.variants[name]
        if isinstance(variant, Small):
            grid, shared = tiles.row_tiles, variant.shared_bytes(m, tiles.blocks)
        else:
            row_blocks = -(-tiles.row_tiles * 16 // variant.rows)
            grid, shared = row_blocks * tiles.blocks // variant.stage_blocks, variant.shared_bytes
        plan = Plan(variant, self._module.function(variant.name), (min(self._processors, grid), 1, 1), shared)
        self._plans[name, m, n, k] = plan
        return plan

    def dequantise(self, weight: NF4Weight, out: Tensor | None = None, stream: int | None = None) -> Tensor:
        """bf16 [N, K]: bitsandbytes' values, but for absmax having been through a multiplication (1 ulp of fp32)."""
        tiles = weight.repacked
        assert isinstance(tiles, Tiles)
        n, k = weight.shape
        dense = torch.empty(n, k, dtype=torch.bfloat16, device=tiles.data.device) if out is None else out
        padded = tiles.data.shape[0] * 4
        grid = min(self._processors * 8, -(-padded * tiles.blocks // 8))
        tensors = map(pointer, (tiles.data, dense, tiles.exact_code))
        arguments = [*tensors, n, k, tiles.blocks, padded]
        self._module.function("nf4_dequantise").launch((grid, 1, 1), 256, arguments, stream=stream)
        return dense
