"""Whole decode steps at OpenLLaMA-7B's shape on this GPU, as the runner captures them: one JSON line a set-up.

Random weights in NF4 (speed does not depend on their values), every token with its own position, pages and adapter;
greedy choice on the device; median over graph replays. Run with PYTHONPATH=core:server:tests:bench.
`--profile`: by kernel; `--prefill`: only that.
"""

import json
import sys
from dataclasses import replace

import torch
from gpu_setup import machine, read_tbps

from cuda_models import random_model
from onebase_server.engine.cuda_forward import CudaForward
from onebase_server.engine.lora_slots import LoraSlots
from onebase_server.engine.model_forward import KVCache, ModelForward, Pools
from onebase_server.engine.weights import Geometry, ModelWeights
from onebase_server.kernels.cuda_ops import CudaKernels
from onebase_server.kernels.ops import NF4Weight, StepMeta

CONTEXT = 192
"""The middle of 128 prompt + 128 output tokens."""
OPENLLAMA = Geometry(32, 4096, 32, 32, 128, 11008, 32000, 1e-6, 2048)


def decode_meta(batch: int, adapters: int, rank: int, page: int, g: Geometry) -> StepMeta:
    """`adapters` spread over the batch; 0: the bare base."""
    width = g.max_context // page
    own = -(-CONTEXT // page)
    tables = torch.zeros(batch, width, dtype=torch.int32)
    tables[:, :own] = torch.randperm(batch * own).int().view(batch, own)
    position = CONTEXT - 1
    slots = tables[:, position // page].long() * page + position % page
    starts = torch.arange(batch).remainder(max(adapters, 1)) * rank

    def put(values: torch.Tensor, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return values.to("cuda", dtype)

    return StepMeta(
        positions=put(torch.full((batch,), position)),
        kv_slots=put(slots, torch.int64),
        query_starts=put(torch.arange(batch + 1)),
        context_lens=put(torch.full((batch,), CONTEXT)),
        block_tables=put(tables),
        token_seqs=put(torch.arange(batch)),
        lora_starts=put(starts),
        lora_ranks=put(torch.full((batch,), rank if adapters else 0)),
        has_lora=adapters > 0,
        max_rank=rank,
        max_query=1,
        max_context=g.max_context,
    )


def step_bytes(model: ModelWeights, batch: int, adapters: int, rank: int, active: frozenset[str]) -> int:
    """The fewest bytes of one step: weights, head, keys and values, adapters."""
    g = model.geometry
    weights = sum(p.weight.repacked.data.numel() for layer in model.layers for p in layer.projections.values())  # type: ignore[union-attr,attr-defined]
    kv = batch * CONTEXT * g.layers * 2 * g.kv_heads * g.head * 2
    lora = sum(
        rank * (len(p.offsets) - 1) * p.weight.shape[1] + rank * p.weight.shape[0]
        for name, p in model.layers[0].projections.items()
        if name in active
    )
    return weights + model.lm_head.numel() * 2 + kv + min(adapters, batch) * lora * 2 * g.layers


def time_step(forward: ModelForward, meta: StepMeta, active: frozenset[str], profile: bool) -> float:
    """Median milliseconds of a replayed decode step with greedy sampling."""
    batch = len(meta.context_lens)
    tokens = torch.randint(0, 32000, (batch,), device="cuda", dtype=torch.int32)
    rows = torch.arange(batch, device="cuda")

    def step() -> None:
        tokens.copy_(forward(tokens, meta, active, rows).argmax(-1))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(25):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            graph.replay()
            torch.cuda.synchronize()
        print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60))
    return sorted(times)[len(times) // 2]


class DenseKernels(CudaKernels):
    """The same forward over bf16 weights: what prefill is held against."""

    def nf4_matmul(self, x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.packed)


def prefill_meta(tokens: int, page: int) -> StepMeta:
    """One sequence of that many new tokens, without an adapter."""

    def ints(values: torch.Tensor, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return values.to("cuda", dtype)

    position, none = torch.arange(tokens), torch.zeros(tokens)
    return StepMeta(
        positions=ints(position),
        kv_slots=ints(position, torch.int64),
        query_starts=ints(torch.tensor([0, tokens])),
        context_lens=ints(torch.tensor([tokens])),
        block_tables=ints(torch.arange(tokens // page)[None]),
        token_seqs=ints(none),
        lora_starts=ints(none),
        lora_ranks=ints(none),
        has_lora=False,
        max_rank=0,
        max_query=tokens,
        max_context=tokens,
    )


def time_prefill(forward: ModelForward, tokens: int) -> float:
    """Median milliseconds, launches included."""
    ids = torch.randint(0, 32000, (tokens,), device="cuda", dtype=torch.int32)
    meta, last = prefill_meta(tokens, forward.cache.page_size), torch.tensor([tokens - 1], device="cuda")
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        forward(ids, meta, frozenset(), last)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def prefill(model: ModelWeights, kernels: CudaKernels, cache: KVCache, pools: list[Pools]) -> CudaForward:
    layers = [
        replace(
            layer,
            projections={
                name: replace(p, weight=replace(p.weight, packed=kernels.nf4.dequantise(p.weight)))
                for name, p in layer.projections.items()
            },
        )
        for layer in model.layers
    ]
    dense = ModelForward(replace(model, layers=layers), DenseKernels(), cache)
    ours = CudaForward(model, kernels, cache, pools)  # folds the weights, so after the copies
    for tokens in (128, 512, 1024, 2048):
        mine, theirs = time_prefill(ours, tokens), time_prefill(dense, tokens)
        line = {
            **machine(),
            "what": "prefill",
            "tokens": tokens,
            "ms": round(mine, 2),
            "bf16_ms": round(theirs, 2),
            "over_bf16": round(theirs / mine, 3),
        }
        print(json.dumps(line), flush=True)
    return ours


@torch.inference_mode()
def main(profile: bool, only_prefill: bool) -> None:
    kernels = CudaKernels()
    model = random_model(OPENLLAMA, kernels)
    page = 16
    cache = KVCache(model, 128 * -(-CONTEXT // page), page)
    slots = LoraSlots(model, 32 * 16)
    for pool in (*slots.a.values(), *slots.b.values()):
        pool.normal_(std=0.02)
    forward = prefill(model, kernels, cache, [slots.layer(i) for i in range(OPENLLAMA.layers)])
    if only_prefill:
        return
    qkv, everything = frozenset({"qkv"}), frozenset(model.layers[0].projections)
    base: dict[int, float] = {}
    for batch in (1, 8, 32, 64, 128):
        for adapters, rank, active in ((0, 8, qkv), (1, 8, qkv), (8, 8, qkv), (32, 8, qkv), (32, 16, everything)):
            if adapters > max(batch, 1) and rank == 8:
                continue
            count = min(adapters, batch)
            meta = decode_meta(batch, count, rank, page, OPENLLAMA)
            ms = time_step(forward, meta, active, profile and adapters in (0, 32) and rank == 8)
            base.setdefault(batch, ms)
            floor = step_bytes(model, batch, count, rank, active if count else frozenset()) / read_tbps() / 1e9
            line = {
                **machine(),
                "what": "decode step, CUDA graph",
                "batch": batch,
                "adapters": count,
                "rank": rank if count else 0,
                "modules": "q,k,v" if active == qkv else "all linear",
                "context": CONTEXT,
                "decode_tok_s": round(batch / ms * 1e3, 1),
                "ms_per_step": round(ms, 3),
                "over_base": round(base[batch] / ms, 3),
                "roofline": round(floor / ms, 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main("--profile" in sys.argv, "--prefill" in sys.argv)
