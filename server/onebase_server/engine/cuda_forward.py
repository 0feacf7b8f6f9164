"""`ModelForward` for Hopper: the same mathematics with fused kernels around the NF4 matmuls.

A layer of a decode step: norm + qkv; LoRA expand + RoPE + KV write + attention; o; norm + gate_up + SwiGLU; down. Up
to eight tokens norms run inside the matmul, above in a kernel of their own. It must not know sampling or requests.
"""

from torch import Tensor

from onebase_server.engine.model_forward import KVCache, ModelForward, Pools
from onebase_server.engine.weights import PROJECTIONS, LayerWeights, ModelWeights
from onebase_server.kernels.cuda_build import is_hopper
from onebase_server.kernels.cuda_dense import DensePipeline
from onebase_server.kernels.cuda_ops import CudaKernels, fits_lora
from onebase_server.kernels.cuda_tiles import Tiles, fold
from onebase_server.kernels.cuda_variants import MAX_TOKENS
from onebase_server.kernels.ops import NF4Weight, StepMeta


def covers(weights: ModelWeights, cache: KVCache, pools: list[Pools]) -> bool:
    """Whether the fused kernels fit: Hopper, bf16, no biases, no norms of q and k, usual head sizes."""
    g = weights.geometry
    layer = weights.layers[0]
    plain = layer.q_norm is None and all(p.bias is None for p in layer.projections.values())
    sizes = g.head in (64, 128, 256) and g.heads // g.kv_heads <= 8 and g.inner % 8 == 0
    tiled = all(isinstance(p.weight.repacked, Tiles) for p in layer.projections.values())
    power_of_two = cache.page_size & (cache.page_size - 1) == 0
    return is_hopper() and plain and sizes and tiled and power_of_two and all(map(fits_lora, pools[0].values()))


class CudaForward(ModelForward):
    """Takes over the weights: gate_up is folded in place, so only this forward may use them afterwards."""

    def __init__(self, weights: ModelWeights, kernels: CudaKernels, cache: KVCache, pools: list[Pools]) -> None:
        super().__init__(weights, kernels, cache, pools)
        assert covers(weights, cache, pools)
        self.cuda = kernels
        self.lora = pools
        for layer in weights.layers:
            weight = layer.projections["gate_up"].weight
            assert isinstance(weight.repacked, Tiles)
            if not weight.repacked.folded:
                weight.repacked = fold(weight.repacked, weight.shape[0])
        order = [layer.projections[name].weight for layer in weights.layers for name in PROJECTIONS]
        self._dense = DensePipeline(kernels.nf4, order)

    def hidden_states(self, token_ids: Tensor, meta: StepMeta, active: frozenset[str]) -> Tensor:
        """The last layer's output after the final norm, [T, hidden]."""
        w, eps = self.weights, self.weights.geometry.eps
        x, residual = w.embed[token_ids.long()], None
        for index, layer in enumerate(w.layers):
            qkv, total = self._with_lora("qkv", x, residual, layer.input_norm, index, layer, meta, active)
            attended = self._attend(qkv, index, meta)
            o = self._project("o", attended, index, layer, meta, active)
            inner, residual = self._gate_up(o, total, index, layer, meta, active)
            x = self._project("down", inner, index, layer, meta, active)
        if residual is None:
            return self.cuda.rms_norm(x, w.norm, eps)
        return self.cuda.add_rms_norm(x, residual, w.norm, eps)[0]

    def _with_lora(
        self,
        name: str,
        x: Tensor,
        residual: Tensor | None,
        gain: Tensor,
        index: int,
        layer: LayerWeights,
        meta: StepMeta,
        active: frozenset[str],
    ) -> tuple[Tensor, Tensor]:
        """Norm, projection and LoRA's part. The shrink comes before the matmul where it can, which hides it."""
        k, weight, pool = self.cuda, layer.projections[name].weight, self.lora[index][name]
        has_lora = meta.has_lora and name in active
        fold_width = self.weights.geometry.inner if name == "gate_up" else 0
        if k.nf4.can_fuse_norm(x.shape[0], weight):
            y, total, normed = k.norm_matmul(x, residual, gain, self.weights.geometry.eps, weight)
            v = k.lora_shrink(normed, pool, meta) if has_lora else None
        else:
            normed, total = self._norm(x, residual, gain)
            v = k.lora_shrink(normed, pool, meta) if has_lora else None
            y = self._multiply(normed, weight)
        if v is not None:
            k.lora_expand_(y, v, pool, meta, fold=fold_width)
        return y, total

    def _multiply(self, x: Tensor, weight: NF4Weight) -> Tensor:
        tokens = x.shape[0]
        if tokens <= MAX_TOKENS:
            return self.cuda.nf4(x, weight)
        return self.cuda.nf4.in_halves(x, weight) if tokens <= 2 * MAX_TOKENS else self._dense(x, weight)

    def _project(
        self, name: str, x: Tensor, index: int, layer: LayerWeights, meta: StepMeta, active: frozenset[str]
    ) -> Tensor:
        pool = self.lora[index][name]
        v = self.cuda.lora_shrink(x, pool, meta) if meta.has_lora and name in active else None
        y = self._multiply(x, layer.projections[name].weight)
        if v is not None:
            self.cuda.lora_expand_(y, v, pool, meta)
        return y

    def _norm(self, x: Tensor, residual: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor]:
        eps = self.weights.geometry.eps
        if residual is None:
            return self.cuda.rms_norm(x, gain, eps), x
        return self.cuda.add_rms_norm(x, residual, gain, eps)

    def _attend(self, qkv: Tensor, index: int, meta: StepMeta) -> Tensor:
        w, k, scale = self.weights, self.cuda, self.weights.geometry.scale
        caches = self.cache.k[index], self.cache.v[index]
        if meta.max_query == 1:
            return k.decode_attention(qkv, (w.cos, w.sin), caches, scale, meta)
        q = k.rope_write_kv(qkv, w.cos, w.sin, *caches, meta)
        return k.paged_attention(q, *caches, scale, meta)

    def _gate_up(
        self, x: Tensor, residual: Tensor, index: int, layer: LayerWeights, meta: StepMeta, active: frozenset[str]
    ) -> tuple[Tensor, Tensor]:
        """(silu(gate) * up, x + residual) of norm(x + residual)."""
        k, weight, gain = self.cuda, layer.projections["gate_up"].weight, layer.post_norm
        if (meta.has_lora and "gate_up" in active) or x.shape[0] > MAX_TOKENS:
            y, total = self._with_lora("gate_up", x, residual, gain, index, layer, meta, active)
            return k.silu_mul(y, folded=True), total
        if k.nf4.can_fuse_norm(x.shape[0], weight):
            eps = self.weights.geometry.eps
            return k.norm_matmul(x, residual, gain, eps, weight, swiglu=True)[:2]
        normed, total = self._norm(x, residual, gain)
        return k.swiglu_matmul(normed, weight), total
