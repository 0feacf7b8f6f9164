"""Random Llama-shaped weights on CUDA for the runner's tests and benchmarks: no download, no quantisation."""

import torch

from nf4_weights import random_weight
from onebase_server.engine.weights import Geometry, LayerWeights, ModelWeights, Projection
from onebase_server.kernels.ops import Kernels


def random_model(g: Geometry, kernels: Kernels) -> ModelWeights:
    """Right shapes, random values."""

    def projection(*rows: int, k: int) -> Projection:
        offsets = [0]
        for n in rows:
            offsets.append(offsets[-1] + n)
        return Projection(kernels.prepare(random_weight(offsets[-1], k)), None, tuple(offsets))

    def dense(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * 0.02).bfloat16()

    gain = torch.ones(g.hidden, device="cuda", dtype=torch.bfloat16)
    q, kv = g.heads * g.head, g.kv_heads * g.head
    layers = [
        LayerWeights(
            gain,
            gain,
            None,
            None,
            {
                "qkv": projection(q, kv, kv, k=g.hidden),
                "o": projection(g.hidden, k=q),
                "gate_up": projection(g.inner, g.inner, k=g.hidden),
                "down": projection(g.hidden, k=g.inner),
            },
        )
        for _ in range(g.layers)
    ]
    angle = torch.outer(
        torch.arange(g.max_context, device="cuda"), 1e4 ** (-torch.arange(g.head // 2, device="cuda") / (g.head // 2))
    )
    return ModelWeights(g, dense(g.vocab, g.hidden), layers, gain, dense(g.vocab, g.hidden), angle.cos(), angle.sin())
