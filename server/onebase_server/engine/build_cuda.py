"""A loaded base on CUDA -> its runner: kernels picked, weights taken over, pages for what memory is left.

Where our kernels can't be built or don't fit, what is missing is done without. It must not know settings or steps.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onebase.adapter import BaseIdentity
from onebase_server.engine.runner_cuda import CudaRunner
from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner
from onebase_server.engine.weights import ModelWeights, read_weights
from onebase_server.kernels.cuda_bnb import BnbKernels, has_bitsandbytes
from onebase_server.kernels.cuda_build import CudaBuildError, available
from onebase_server.kernels.cuda_ops import CudaKernels
from onebase_server.kernels.cuda_tiles import Tiles
from onebase_server.kernels.ops import Kernels
from onebase_server.kernels.torch_ops import TorchKernels

logger = logging.getLogger(__name__)


def build_cuda_runner(
    base: Any,
    config: RunnerConfig,
    *,
    cache_dir: Path | None = None,
    identity: BaseIdentity | None = None,
    kernels: Kernels | None = None,
    num_pages: Callable[[int, bool], int] | None = None,
    release: bool = False,
) -> TorchRunner:
    """`base` is a `onebase.base_model.LoadedBase` on CUDA; compiled kernels are kept in `cache_dir`. Where our kernels
    can't be built or don't fit the model, a runner that does without what is missing.

    `kernels`: others than `cuda_kernels` picks. `num_pages(free bytes, with graphs)`: how many KV pages, asked once the
    weights lie as they will; else `config`'s. `release`: `base.model` is not needed any more, so that memory holds the
    weights once.
    """
    kernels = kernels or cuda_kernels(base.model.config, cache_dir)
    weights = read_weights(base.model, kernels, config.max_context, release=release)
    fits = isinstance(kernels, CudaKernels) and can_capture(weights, config.page_size)
    if isinstance(kernels, CudaKernels) and not fits:
        logger.warning("%s: decode steps run without CUDA graphs: its sizes are not the kernels'", base.spec.id)
    if num_pages is not None:
        torch.cuda.empty_cache()
        config = replace(config, num_pages=num_pages(torch.cuda.mem_get_info(weights.device)[0], fits))
    named: dict[str, Any] = {
        "eos_token_ids": base.tokenizer.eos_ids,
        "identity": identity if identity is not None else base.spec.identity,
    }
    if fits:
        assert isinstance(kernels, CudaKernels)
        runner: TorchRunner = CudaRunner(weights, kernels, config, **named)
    else:
        runner = TorchRunner(weights, kernels, config, **named)
    log_memory(runner)
    return runner


def cuda_kernels(config: Any, cache_dir: Path | None) -> Kernels:
    """Ours, all compiled; where they can't be, bitsandbytes' matmul in plain torch, with a warning. `config`: the
    model's, in transformers' words."""
    try:
        if available():
            kernels = CudaKernels(cache_dir)
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            kernels.compile_attention(head, config.num_attention_heads // config.num_key_value_heads)
            return kernels
    except CudaBuildError as error:
        logger.warning("our CUDA kernels can't be built here: %s", error)
    if not has_bitsandbytes():
        logger.warning("NF4 weights are multiplied in plain torch: slow; bitsandbytes would be faster")
        return TorchKernels()
    logger.warning("NF4 weights are multiplied by bitsandbytes, all else is plain torch: several times slower")
    return BnbKernels()


def can_capture(weights: ModelWeights, page_size: int) -> bool:
    """Whether a decode step runs on our kernels alone, without a sync with the host in it."""
    g, projections = weights.geometry, weights.layers[0].projections.values()
    tiled = all(isinstance(p.weight.repacked, Tiles) for p in projections)
    even = all(p.weight.shape[1] % 64 == 0 and all(o % 8 == 0 for o in p.offsets) for p in projections)
    heads = g.head in (64, 128, 256) and g.heads // g.kv_heads <= 8
    return weights.dtype == torch.bfloat16 and tiled and even and heads and page_size & (page_size - 1) == 0


def log_memory(runner: TorchRunner) -> None:
    """What the device's memory went to, in words for the operator."""
    w = runner.weights
    tiles = [p.weight.repacked for layer in w.layers for p in layer.projections.values()]
    dense = {t.data_ptr(): t.numel() * t.element_size() for t in (w.embed, w.lm_head)}
    parts = {
        "NF4 weights in tiles": sum(t.data.numel() for t in tiles if isinstance(t, Tiles)),
        "embeddings": sum(dense.values()),
        "KV pages": 2 * runner.cache.k.numel() * runner.cache.k.element_size(),
        "adapter slots": runner.slots.nbytes,
    }
    if isinstance(runner, CudaRunner):
        parts[f"{runner.num_graphs} graphs"] = runner.graph_bytes
    free, total = torch.cuda.mem_get_info(runner.device)
    shown = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
    logger.info("device memory taken, GB: %s; %.2f of %.2f free", shown, free / 1e9, total / 1e9)
