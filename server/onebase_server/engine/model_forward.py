"""The lean forward of a Llama-family model: packed tokens of many sequences in, logits of the sampling rows out.

One pass over the kernels of any backend; no cache object, no masks, no Python a sequence. It must not know adapters,
requests or the scheduler: what it needs of a step is in `StepMeta`.
"""

from torch import Tensor
from torch.nn import functional

from onebase_server.engine.weights import LayerWeights, ModelWeights, Projection
from onebase_server.engine.zeroed import zeroed
from onebase_server.kernels.ops import Kernels, LoraPool, StepMeta

Pools = dict[str, LoraPool]


class KVCache:
    """Pages of all layers: k and v are [layers, pages, page_size, kv heads, head]. Page 0 is an ordinary page."""

    def __init__(self, weights: ModelWeights, num_pages: int, page_size: int) -> None:
        g = weights.geometry
        shape = (g.layers, num_pages, page_size, g.kv_heads, g.head)
        self.page_size = page_size
        self.k = zeroed(shape, weights.dtype, weights.device)
        self.v = zeroed(shape, weights.dtype, weights.device)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy page src -> dst in every layer."""
        if not pairs:
            return
        source, target = (list(side) for side in zip(*pairs, strict=True))
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]


class ModelForward:
    """Weights + kernels + cache. `pools[layer]` are the LoRA pools; None serves the bare base only."""

    def __init__(
        self, weights: ModelWeights, kernels: Kernels, cache: KVCache, pools: list[Pools] | None = None
    ) -> None:
        self.weights = weights
        self.kernels = kernels
        self.cache = cache
        self.pools = pools

    def __call__(self, token_ids: Tensor, meta: StepMeta, active: frozenset[str], sample_tokens: Tensor) -> Tensor:
        """token_ids [T]; `active` projections have LoRA work; sample_tokens [R] index T -> logits [R, V] in fp32."""
        hidden = self.hidden_states(token_ids, meta, active)
        return functional.linear(hidden[sample_tokens], self.weights.lm_head).float()

    def hidden_states(self, token_ids: Tensor, meta: StepMeta, active: frozenset[str]) -> Tensor:
        """The last layer's output after the final norm, [T, hidden]."""
        w, k, eps = self.weights, self.kernels, self.weights.geometry.eps
        residual = w.embed[token_ids.long()]
        normed = k.rms_norm(residual, w.layers[0].input_norm, eps)
        for index, layer in enumerate(w.layers):
            attended = self._attention(normed, index, layer, meta, active)
            normed, residual = k.add_rms_norm(attended, residual, layer.post_norm, eps)
            gate_up = self._project("gate_up", normed, index, layer, meta, active)
            inner = self._project("down", k.silu_mul(gate_up), index, layer, meta, active)
            following = w.layers[index + 1].input_norm if index + 1 < len(w.layers) else w.norm
            normed, residual = k.add_rms_norm(inner, residual, following, eps)
        return normed

    def _attention(self, x: Tensor, index: int, layer: LayerWeights, meta: StepMeta, active: frozenset[str]) -> Tensor:
        w, k, g = self.weights, self.kernels, self.weights.geometry
        qkv = self._project("qkv", x, index, layer, meta, active)
        if layer.q_norm is not None and layer.k_norm is not None:
            heads = qkv.view(qkv.shape[0], -1, g.head)
            q, key = heads[:, : g.heads], heads[:, g.heads : g.heads + g.kv_heads]
            q.copy_(k.rms_norm(q.contiguous(), layer.q_norm, g.eps))
            key.copy_(k.rms_norm(key.contiguous(), layer.k_norm, g.eps))
        k_cache, v_cache = self.cache.k[index], self.cache.v[index]
        q = k.rope_write_kv(qkv, w.cos, w.sin, k_cache, v_cache, meta)
        attended = k.paged_attention(q, k_cache, v_cache, g.scale, meta)
        return self._project("o", attended, index, layer, meta, active)

    def _project(
        self, name: str, x: Tensor, index: int, layer: LayerWeights, meta: StepMeta, active: frozenset[str]
    ) -> Tensor:
        projection: Projection = layer.projections[name]
        y = self.kernels.nf4_matmul(x, projection.weight)
        if projection.bias is not None:
            y += projection.bias
        if self.pools is not None and name in active:
            self.kernels.lora_add_(y, x, self.pools[index][name], meta)
        return y
