"""`CudaKernels`: the CUDA backend of the `Kernels` protocol for bf16 models.

Launches of our own kernels (cuda/*.cu) and, for prefill, of cuBLAS and torch's flash attention. What a kernel does
not cover (fp32, odd sizes) goes to the torch twin. No sync with the host in a decode step, so a step can be captured
in a CUDA graph. It must not know models, sequences or adapters beyond `StepMeta`.
"""

import ctypes
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase_server.kernels.cuda_attention import DecodeAttention, VarlenAttention
from onebase_server.kernels.cuda_bnb import BnbMatmul, has_bitsandbytes
from onebase_server.kernels.cuda_build import CudaModule, pointer, read_source
from onebase_server.kernels.cuda_nf4 import Fusion, NF4Matmul
from onebase_server.kernels.cuda_tiles import Tiles, repack, supports
from onebase_server.kernels.ops import LoraPool, NF4Weight, StepMeta
from onebase_server.kernels.torch_ops import TorchKernels

_LOG2_E = math.log2(math.e)
_FUSED_HEADS = 1200  # sequences x kv heads
_MAX_SLICES = 8
_Borders = ctypes.c_int * (_MAX_SLICES + 1)
_TOKENWISE = 128
"""Up to so many tokens a step, each token reads its own adapter's rows; above, tiles of 16 tokens share them."""


class CudaKernels:
    """Use on one stream at a time: split-K and attention workspaces are shared by all launches."""

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._cache_dir = cache_dir
        self._twin = TorchKernels()
        self.nf4 = NF4Matmul(cache_dir)
        self._lora = CudaModule(read_source("lora.cu"), cache_dir=cache_dir)
        self._elementwise = CudaModule(read_source("elementwise.cu"), cache_dir=cache_dir)
        self._sample = CudaModule(read_source("sample.cu"), cache_dir=cache_dir)
        self._decode: dict[tuple[int, int], DecodeAttention] = {}
        self._varlen = VarlenAttention()

    def compile_attention(self, head: int, group: int) -> None:
        """For heads of that size, `group` of them a kv head, if the kernel takes them. Raises CudaBuildError now, where
        there still is a fallback, and not in a step."""
        if _fits_attention(head, group):
            self._decoder(head, group)

    def prepare(self, weight: NF4Weight) -> NF4Weight:
        """Tiles replace the packed nibbles, so that the weight is held once. What tiles don't suit is bitsandbytes'."""
        if not supports(weight):
            return weight
        if not self.nf4.covers(weight):
            return replace(weight, repacked=BnbMatmul(weight)) if has_bitsandbytes() else weight
        nothing = torch.empty(0, dtype=torch.uint8, device=weight.packed.device)
        return replace(weight, repacked=repack(weight), packed=nothing, absmax=nothing.float())

    def nf4_matmul(self, x: Tensor, weight: NF4Weight) -> Tensor:
        if isinstance(weight.repacked, BnbMatmul) and x.dtype == torch.bfloat16:
            return weight.repacked(x)
        if not isinstance(weight.repacked, Tiles):
            return self._twin.nf4_matmul(x, weight)
        if x.dtype != torch.bfloat16:
            return torch.nn.functional.linear(x, self.nf4.dequantise(weight).to(x.dtype))
        return self.nf4(x, weight)

    def lora_add_(self, y: Tensor, x: Tensor, pool: LoraPool, meta: StepMeta) -> None:
        if not meta.has_lora or meta.max_rank == 0:
            return
        if y.dtype != torch.bfloat16 or not fits_lora(pool):
            self._twin.lora_add_(y, x, pool, meta)
            return
        self.lora_expand_(y, self.lora_shrink(x, pool, meta), pool, meta)

    def lora_shrink(self, x: Tensor, pool: LoraPool, meta: StepMeta) -> Tensor:
        """x A^T of each token's own adapter, fp32 [T, I, largest rank, in eights]; undefined past its rank."""
        slices, rows, k = pool.a.shape
        tokens, chunks = x.shape[0], -(-meta.max_rank // 8)
        v = torch.empty(tokens, slices, chunks * 8, dtype=torch.float32, device=x.device)
        tensors = list(map(pointer, (x, pool.a, v, meta.lora_starts, meta.lora_ranks)))
        sizes = (slices, rows, k, x.stride(0), chunks * 8)
        if _tokenwise(meta, tokens):
            split = 4 if tokens <= 8 else 2 if tokens <= 32 else 1
            grid = (tokens, slices, chunks * split)
            self._lora.function("lora_shrink").launch(grid, 256, [*tensors, *sizes, split])
        else:
            grid = (-(-tokens // 16), slices, chunks)
            arguments = [*tensors, tokens, *sizes]
            self._lora.function("lora_shrink_tiles").launch(grid, 128, arguments)
        return v

    def lora_expand_(self, y: Tensor, v: Tensor, pool: LoraPool, meta: StepMeta, fold: int = 0) -> None:
        """y += v B; `fold`: y's columns are gate and up of that width in turns of eight."""
        (tokens, n), slices = y.shape, pool.a.shape[0]
        borders = _Borders(*pool.offsets, *([n] * (_MAX_SLICES - slices)))
        arguments: list[Any] = [*map(pointer, (y, pool.b, v, meta.lora_starts, meta.lora_ranks)), borders]
        sizes, columns = (slices, n, v.shape[2], fold), -(-n // 1024)
        if _tokenwise(meta, tokens):
            self._lora.function("lora_expand").launch((columns, tokens, 1), 128, [*arguments, *sizes])
        else:
            grid = (columns, -(-tokens // 16), 1)
            arguments.append(tokens)
            self._lora.function("lora_expand_tiles").launch(grid, 128, [*arguments, *sizes])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _vectorised(x):
            return self._twin.rms_norm(x, weight, eps)
        return self._norm(x, None, weight, eps)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not _vectorised(x):
            return self._twin.add_rms_norm(x, residual, weight, eps)
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        k = x.shape[-1]
        out = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        arguments = [
            pointer(x),
            0 if residual is None else pointer(residual),
            pointer(weight),
            pointer(out),
            pointer(total),
            k,
            ctypes.c_float(eps),
        ]
        self._elementwise.function("rms_norm").launch((x.numel() // k, 1, 1), 512, arguments)
        return out, total

    def rope_write_kv(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, meta: StepMeta
    ) -> Tensor:
        groups, head = k_cache.shape[2], k_cache.shape[3]
        if qkv.dtype != torch.bfloat16 or head % 16:
            return self._twin.rope_write_kv(qkv, cos, sin, k_cache, v_cache, meta)
        tokens, heads = qkv.shape[0], qkv.shape[1] // head - 2 * groups
        q = torch.empty(tokens, heads, head, dtype=qkv.dtype, device=qkv.device)
        tensors = (qkv, cos, sin, q, k_cache, v_cache, meta.positions.int(), meta.kv_slots)
        items = (heads + groups) * head // 16 + groups * head // 8
        rope = self._elementwise.function("rope_write_kv")
        rope.launch((-(-items // 256), tokens, 1), 256, [*map(pointer, tensors), heads, groups, head])
        return q

    def paged_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, meta: StepMeta) -> Tensor:
        page, groups, head = k_cache.shape[1:]
        group = q.shape[1] // groups
        if not self.takes_flat(head, group, page, q.dtype):
            return self._twin.paged_attention(q, k_cache, v_cache, scale, meta)
        if meta.max_query > 1:
            return self._varlen(q, k_cache, v_cache, scale, meta)
        return self._decoder(head, group)(q.flatten(1), None, (k_cache, v_cache), scale * _LOG2_E, meta)

    def takes_flat(self, head: int, group: int, page: int, dtype: torch.dtype) -> bool:
        """Whether `paged_attention` takes steps that are flat (`StepMeta.is_flat`), for models of that kind."""
        return dtype == torch.bfloat16 and _fits_attention(head, group) and not page & (page - 1)

    def decode_attention(
        self,
        qkv: Tensor,
        tables: tuple[Tensor, Tensor],
        caches: tuple[Tensor, Tensor],
        scale: float,
        meta: StepMeta,
    ) -> Tensor:
        """`rope_write_kv` and `paged_attention` for steps of one token a sequence: in one kernel where that is faster
        (each CTA repeats the first, which small batches hide)."""
        if meta.is_flat or len(qkv) * caches[0].shape[2] > _FUSED_HEADS:
            q = self.rope_write_kv(qkv, *tables, *caches, meta)
            return self.paged_attention(q, *caches, scale, meta)
        groups, head = caches[0].shape[2:]
        group = qkv.shape[1] // (groups * head) - 2
        return self._decoder(head, group)(qkv, tables, caches, scale * _LOG2_E, meta)

    def _decoder(self, head: int, group: int) -> DecodeAttention:
        if (head, group) not in self._decode:
            self._decode[head, group] = DecodeAttention(head, group, self._cache_dir)
        return self._decode[head, group]

    def norm_matmul(
        self, x: Tensor, residual: Tensor | None, gain: Tensor, eps: float, weight: NF4Weight, *, swiglu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(norm(x + residual) W^T, x + residual, the normalised x) in one kernel where `nf4.can_fuse_norm`."""
        total = x if residual is None else torch.empty_like(x)
        normed = torch.empty_like(x)
        fusion = Fusion(
            residual=None if residual is None else residual.data_ptr(),
            gain=gain.data_ptr(),
            total=total.data_ptr(),
            normed=normed.data_ptr(),
            eps=eps,
            swiglu=int(swiglu),
        )
        return self.nf4.fused(x, weight, fusion), total, normed

    def swiglu_matmul(self, x: Tensor, weight: NF4Weight) -> Tensor:
        """silu(gate) * up of a folded gate_up projection, [T, N / 2]."""
        if self.nf4.can_fuse(x.shape[0], weight):
            return self.nf4.fused(x, weight, Fusion(swiglu=1))
        return self.silu_mul(self.nf4(x, weight), folded=True)

    def advance_step(self, tokens: Tensor, chosen: Tensor, meta: StepMeta) -> None:
        """Make the static inputs of a decode step those of the next, on the device: see cuda/elementwise.cu."""
        tensors = (tokens, chosen, meta.positions, meta.context_lens, meta.kv_slots)
        arguments = [*map(pointer, tensors), len(tokens)]
        self._elementwise.function("advance_step").launch((1, 1, 1), 256, arguments)

    def draw_tokens(self, logits: Tensor, temperatures: Tensor, uniforms: Tensor, out: Tensor) -> None:
        """One token a row of logits [R, V] bf16: the likeliest where the fp64 temperature is 0, else by inverse CDF."""
        tensors = (logits, temperatures, uniforms, out)
        self._sample.function("draw_tokens").launch(
            (len(logits), 1, 1), 1024, [*map(pointer, tensors), logits.shape[1]]
        )

    def silu_mul(self, gate_up: Tensor, *, folded: bool = False) -> Tensor:
        tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
        if gate_up.dtype != torch.bfloat16 or inner % 8:
            return self._twin.silu_mul(gate_up)
        out = torch.empty(tokens, inner, dtype=gate_up.dtype, device=gate_up.device)
        grid = (-(-inner // 2048), tokens, 1)
        self._elementwise.function("silu_mul").launch(grid, 256, [pointer(gate_up), pointer(out), inner, int(folded)])
        return out


def _fits_attention(head: int, group: int) -> bool:
    return head in (64, 128, 256) and group <= 8


def fits_lora(pool: LoraPool) -> bool:
    """Whether the LoRA kernels take these sizes."""
    slices, _, k = pool.a.shape
    return k % 64 == 0 and slices <= _MAX_SLICES and all(o % 8 == 0 for o in pool.offsets)


def _tokenwise(meta: StepMeta, tokens: int) -> bool:
    return tokens <= _TOKENWISE or (meta.max_query <= 1 and not meta.is_flat)


def _vectorised(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 16384
