"""The operations a forward pass is made of, as one protocol: plain torch, CPU (C++) and CUDA backends implement it.

Every backend is tested against `TorchKernels` (kernels/torch_ops.py), which is tested against fp64. Nothing here
knows about sequences, requests or adapters' names.
Legend: T tokens, S sequences, K in features, N out features, H query heads, G kv heads, D head size, P pages,
R rank rows of the LoRA pool, I slices of a fused projection (q,k,v: 3; gate,up: 2; else 1).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share one absmax (QLoRA, arXiv 2305.14314, section 3)."""


@dataclass(slots=True)
class NF4Weight:
    """A frozen linear layer [N, K] in bitsandbytes' NF4 codebook and layout, nested absmax un-nested at load.

    Fused projections are concatenated along N, which is exact: blocks run along K."""

    packed: Tensor  # uint8 [N, K // 2], high nibble first (even column), as bitsandbytes packs
    absmax: Tensor  # float32 [N, K // BLOCK]
    shape: tuple[int, int]  # (N, K)
    code: Tensor  # float32 [16]
    repacked: object | None = None
    """A backend's own layout, made once at load; may replace `packed` (then None-able by that backend)."""


@dataclass(slots=True)
class LoraPool:
    """All resident adapters of one (fused) projection, padding-free in the rank: an adapter owns rows
    [start, start + rank) of every pool. Scaling (alpha / r, rsLoRA) is folded into `b` at load."""

    a: Tensor  # [I, R, K]
    b: Tensor  # [R, N]: slice i of the projection uses columns offsets[i]:offsets[i+1]
    offsets: tuple[int, ...]  # I + 1 column borders


@dataclass(slots=True)
class StepMeta:
    """Built once a step, shared by all layers. Device tensors, static buffers under CUDA graphs."""

    positions: Tensor  # int32/int64 [T]
    kv_slots: Tensor  # int64 [T]: page * page_size + offset where the token's K and V are written
    query_starts: Tensor  # int32 [S + 1]
    context_lens: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [S, B]
    token_seqs: Tensor  # int32 [T]: which sequence
    lora_starts: Tensor  # int32 [T]: first rank row of the token's adapter
    lora_ranks: Tensor  # int32 [T]: 0 for the bare base
    has_lora: bool
    max_rank: int
    max_query: int
    max_context: int
    is_flat: bool = False
    """Each token is given as a sequence of its own (one query, as much context as it sees), whose pages are row
    `token_seqs` of the tables: some may belong together, so all keys and values are written before attention."""
    total_context: int | None = None
    """The sum of `context_lens`, where the host knows it: else who needs it has to wait for the device."""


class Kernels(Protocol):
    """One backend. In-place where the name says so; outputs are fresh unless `out` is given."""

    def prepare(self, weight: NF4Weight) -> NF4Weight:
        """Repack for this backend, once at load."""
        ...

    def nf4_matmul(self, x: Tensor, weight: NF4Weight) -> Tensor:
        """x [T, K] @ W.T -> [T, N] in x's dtype, accumulated in fp32."""
        ...

    def lora_add_(self, y: Tensor, x: Tensor, pool: LoraPool, meta: StepMeta) -> None:
        """y [T, N] += (x A.T) B for each token's own adapter; rows with rank 0 are untouched, bit for bit."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        ...

    def rope_write_kv(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, meta: StepMeta
    ) -> Tensor:
        """Rotate q and k of qkv [T, (H + 2G) * D] (Llama's half-split RoPE; cos, sin [max_context, D // 2] in fp32),
        write k, v into the caches [P, page_size, G, D] at meta.kv_slots, return q [T, H, D]."""
        ...

    def paged_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, meta: StepMeta) -> Tensor:
        """Causal attention of each token over its own sequence's pages -> [T, H * D]. Grouped queries."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [T, 2F] -> [T, F]."""
        ...


def default_device() -> torch.device:
    """CUDA if there is one, else CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
