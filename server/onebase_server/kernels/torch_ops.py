"""Plain torch twin of every kernel: exact, slow, on any device and in fp32 as in bf16.

The other backends are tested against this one, and this one against float64 and transformers. It rounds where
transformers rounds (norms, projections and rotations end in the compute dtype) and accumulates in fp32. It must not
know about sequences' adapters by name, pages' owners or requests.
"""

import torch
from torch import Tensor
from torch.nn import functional

from onebase_server.kernels.ops import BLOCK, LoraPool, NF4Weight, StepMeta


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] as plain values: code * absmax in fp32, then rounded to `dtype`, as bitsandbytes does."""
    n, k = weight.shape
    high, low = weight.packed >> 4, weight.packed & 0xF
    codes = torch.stack((high, low), dim=-1).view(n, k // BLOCK, BLOCK)
    return (weight.code[codes.int()] * weight.absmax[:, :, None]).view(n, k).to(dtype)


class TorchKernels:
    """Implements `Kernels`. Keeps no state, so one object serves any number of models."""

    def prepare(self, weight: NF4Weight) -> NF4Weight:
        return weight

    def nf4_matmul(self, x: Tensor, weight: NF4Weight) -> Tensor:
        return functional.linear(x, dequantize(weight, x.dtype))

    def lora_add_(self, y: Tensor, x: Tensor, pool: LoraPool, meta: StepMeta) -> None:
        """One pass for each adapter in the step: simple, and the same sums as PEFT's."""
        if not meta.has_lora:
            return
        pairs = torch.stack((meta.lora_starts, meta.lora_ranks), dim=1)
        for start, rank in torch.unique(pairs, dim=0).tolist():
            if rank == 0:
                continue
            rows = ((meta.lora_starts == start) & (meta.lora_ranks == rank)).nonzero()[:, 0]
            own = x[rows].float()
            for i, (low, high) in enumerate(zip(pool.offsets, pool.offsets[1:], strict=False)):
                down = own @ pool.a[i, start : start + rank].float().T
                delta = down @ pool.b[start : start + rank, low:high].float()
                y[rows, low:high] = (y[rows, low:high].float() + delta).to(y.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * scaled.to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rope_write_kv(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, meta: StepMeta
    ) -> Tensor:
        groups, head = k_cache.shape[2], k_cache.shape[3]
        heads = qkv.shape[1] // head - 2 * groups
        wide = qkv.view(qkv.shape[0], -1, head)
        q, k, v = wide[:, :heads], wide[:, heads : heads + groups], wide[:, heads + groups :]
        position = meta.positions.long()
        c, s = cos[position][:, None], sin[position][:, None]
        k_cache.view(-1, groups, head)[meta.kv_slots] = _rotate(k, c, s).to(k_cache.dtype)
        v_cache.view(-1, groups, head)[meta.kv_slots] = v.to(v_cache.dtype)
        return _rotate(q, c, s)

    def paged_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, meta: StepMeta) -> Tensor:
        out = torch.empty_like(q)
        page = k_cache.shape[1]
        starts, lengths = meta.query_starts.tolist(), meta.context_lens.tolist()
        for s, length in enumerate(lengths):
            rows = slice(starts[s], starts[s + 1])
            pages = meta.block_tables[s, : -(-length // page)].long()
            k = k_cache[pages].flatten(0, 1)[:length]
            v = v_cache[pages].flatten(0, 1)[:length]
            visible = torch.arange(length, device=q.device)[None] <= meta.positions[rows, None]
            out[rows] = _attend(q[rows], k, v, visible, scale)
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's half-split rotation of x [T, heads, D] in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [Q, H, D] over k, v [C, G, D] in fp32; visible [Q, C]."""
    queries, heads, head = q.shape
    groups = k.shape[1]
    grouped = q.float().view(queries, groups, heads // groups, head)
    scores = torch.einsum("qghd,cgd->ghqc", grouped, k.float()) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = torch.einsum("ghqc,cgd->qghd", weights, v.float())
    return out.reshape(queries, heads, head).to(q.dtype)
