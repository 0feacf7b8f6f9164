"""Attention over paged KV on CUDA: our own kernel for decode steps, torch's flash attention over gathered pages else.

It must not know models or requests: what it needs of a step is in `StepMeta`.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from onebase_server.kernels.cuda_build import CudaModule, pointer, read_source
from onebase_server.kernels.ops import StepMeta

_MAX_SPLITS = 32
_BUSY_CTAS = 1056
"""Eight a multiprocessor on an H100: below it the context is split further."""
_SPLIT_TOKENS = 512
"""A context longer than this is split in any case, so that one long sequence does not hold up the step."""


class DecodeAttention:
    """From the qkv projection of one new token a sequence to the attended values, K and V written on the way.
    Compiled for one head size and one number of query heads a kv head."""

    def __init__(self, head: int, group: int, cache_dir: Path | None) -> None:
        defines = (f"-DHEAD_DIM={head}", f"-DGROUP={group}")
        module = CudaModule(read_source("attention.cu"), defines=defines, cache_dir=cache_dir)
        self._kernel = module.function("attention_decode")
        self._head, self._group = head, group
        self._workspace = torch.empty(0, device="cuda")
        self._counters = torch.zeros(0, dtype=torch.int32, device="cuda")
        self._retired: list[Tensor] = []

    def __call__(
        self,
        qkv: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        caches: tuple[Tensor, Tensor],
        scale: float,
        meta: StepMeta,
    ) -> Tensor:
        """qkv [S, (H + 2G) D] -> [S, H D]; `tables` are cos and sin, `scale` includes log2(e). A sequence
        with no context keeps whatever was there. Without `tables`: attention alone, of rotated q [S, H D] over a
        cache that has it all. Of a flat step S is the tokens."""
        seqs = qkv.shape[0]
        page, groups = caches[0].shape[1:3]
        heads, head = groups * self._group, self._head
        busy = -(-_BUSY_CTAS // (seqs * groups))
        splits = min(max(busy, -(-meta.max_context // _SPLIT_TOKENS)), _MAX_SPLITS)
        min_chunk = 32 if busy > 4 else 64 if busy > 1 else 256
        self._reserve(seqs * heads * splits * (head + 2), seqs * groups)
        out = torch.empty(seqs, heads * head, dtype=qkv.dtype, device=qkv.device)
        step = (meta.kv_slots, meta.context_lens, meta.block_tables, self._workspace, self._counters)
        arguments = [
            *map(pointer, (qkv, *caches, out)),
            *((0, 0) if tables is None else map(pointer, tables)),
            *map(pointer, step),
            pointer(meta.token_seqs) if meta.is_flat else 0,
            meta.block_tables.stride(0),
            page.bit_length() - 1,
            ctypes.c_float(scale),
            min_chunk,
        ]
        self._kernel.launch((groups, seqs, splits), 128, arguments)
        return out

    def _reserve(self, floats: int, counters: int) -> None:
        """Grow only; what captured graphs hold stays."""
        if self._workspace.numel() < floats:
            self._retired.append(self._workspace)
            self._workspace = torch.empty(floats, dtype=torch.float32, device="cuda")
        if self._counters.numel() < counters:
            self._retired.append(self._counters)
            self._counters = torch.zeros(counters, dtype=torch.int32, device="cuda")


class VarlenAttention:
    """Any number of query tokens a sequence: pages gathered once a layer, then variable-length flash attention."""

    def __init__(self) -> None:
        self._meta: StepMeta | None = None
        self._rows = self._key_starts = torch.empty(0)

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, meta: StepMeta) -> Tensor:
        page, groups, head = k_cache.shape[1:]
        if self._meta is not meta:
            self._plan(meta, page)
        keys = k_cache.view(-1, groups, head).index_select(0, self._rows)
        values = v_cache.view(-1, groups, head).index_select(0, self._rows)
        out = torch.ops.aten._flash_attention_forward(
            q,
            keys,
            values,
            meta.query_starts,
            self._key_starts,
            meta.max_query,
            meta.max_context,
            0.0,
            True,
            False,
            scale=scale,
        )[0]
        result: Tensor = out.flatten(1)
        return result

    def _plan(self, meta: StepMeta, page: int) -> None:
        """Cache rows of every sequence's context, one after the other: shared by all layers."""
        lengths = meta.context_lens.long()
        ends = lengths.cumsum(0)
        numbers = torch.arange(len(lengths), device=lengths.device)
        seqs = torch.repeat_interleave(numbers, lengths, output_size=meta.total_context)
        offset = torch.arange(len(seqs), device=lengths.device) - (ends - lengths)[seqs]
        pages = meta.block_tables[seqs, offset // page].long()
        self._rows = pages * page + offset % page
        self._key_starts = torch.nn.functional.pad(ends, (1, 0)).int()
        self._meta = meta
