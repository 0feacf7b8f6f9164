"""Decode through the real `Engine` at OpenLLaMA-7B's shape on this GPU: 128 prompt and 128 output tokens a request.

Random NF4 weights and adapters; all requests at once; greedy, then the bare base at a temperature. The rate is taken
over the window in which every request decodes (from the last first token to the first end). One JSON line a set-up.
PYTHONPATH=core:server:tests:bench.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

import numpy as np
import torch
from gpu_engine import OPENLLAMA, step_bytes
from gpu_setup import machine, read_tbps

from cuda_models import random_model
from gpu_runners import random_adapter
from onebase_server.device_budget import Needs, plan_memory
from onebase_server.engine.engine import Engine
from onebase_server.engine.host_adapter import TorchHostAdapter
from onebase_server.engine.runner_cuda import CudaRunner
from onebase_server.engine.runner_torch import RunnerConfig
from onebase_server.engine.types import AdapterRef, GenerationRequest, SamplingParams
from onebase_server.kernels.cuda_ops import CudaKernels

PROMPT, OUTPUT = 128, 128


class Words:
    """A tokenizer as the engine sees it."""

    vocab_size = OPENLLAMA.vocab

    def token_bytes(self, token_id: int, /) -> bytes:
        return b" %d" % token_id


class BenchRunner(CudaRunner):
    """Adapters are made up, one a digest: rank 8 on q, k, v, or rank 16 on everything."""

    def projections(self, kind: str) -> frozenset[str]:
        """That adapters of a kind change."""
        return frozenset(self.slots.a if kind == "all" else {"qkv"} if kind == "a" else ())

    def read_adapter(self, ref: AdapterRef) -> TorchHostAdapter:
        kind = ref.name.rstrip("0123456789")
        adapter: TorchHostAdapter = random_adapter(self, RANKS[kind], self.projections(kind))
        return adapter


async def _one(engine: Engine, request: GenerationRequest) -> list[tuple[float, int]]:
    handle = engine.submit(request)
    return [(time.perf_counter(), len(event.token_ids)) async for event in handle.events()]


async def _measure(
    engine: Engine, batch: int, refs: list[AdapterRef], round_: int, temperature: float
) -> dict[str, float]:
    rng = np.random.default_rng(batch * 100 + round_)
    sampling = SamplingParams(max_tokens=OUTPUT, temperature=temperature, ignore_eos=True)
    requests = [
        GenerationRequest(
            id=str(i),
            prompt_ids=tuple(int(t) for t in rng.integers(5, 31000, PROMPT)),
            sampling=sampling,
            adapter=refs[i % len(refs)] if refs else None,
        )
        for i in range(batch)
    ]
    start = time.perf_counter()
    traces = await asyncio.gather(*(_one(engine, request) for request in requests))
    begin, end = max(t[0][0] for t in traces), min(t[-1][0] for t in traces)
    tokens = sum(n for trace in traces for at, n in trace if begin < at <= end)
    total = time.perf_counter() - start
    return {
        "decode_tok_s": tokens / (end - begin),
        "end_to_end_tok_s": batch * OUTPUT / total,
        "first_token_ms": (begin - start) * 1e3,
    }


RANKS = {"base": 0, "a": 8, "all": 16}
SETUPS = {"base": ("base", 0), "1": ("a", 1), "8": ("a", 8), "32": ("a", 32), "all": ("all", 32)}
"""Name -> first letters of its adapters (see `BenchRunner`), and how many."""


def _planned_graph_bytes(config: RunnerConfig) -> int:
    """What a server of these sizes would set apart for graphs."""
    g = OPENLLAMA
    needs = Needs(
        config={
            "num_hidden_layers": g.layers,
            "num_attention_heads": g.heads,
            "hidden_size": g.hidden,
            "intermediate_size": g.inner,
            "vocab_size": g.vocab,
        },
        element_bytes=2,
        max_context=g.max_context,
        max_sequences=config.max_batch_sequences,
        max_step_tokens=config.max_batch_tokens,
        adapter_slots=config.num_slots,
        max_lora_rank=config.max_lora_rank,
        has_graphs=True,
    )
    return plan_memory(needs, 1 << 40).graphs


def main(batches: list[int], temperature: float, sampled: list[int], setups: list[str]) -> None:
    kernels = CudaKernels(Path("/tmp/onebase-cubins"))
    config = RunnerConfig(
        num_pages=128 * 17, num_slots=32, max_lora_rank=16, max_batch_tokens=2048, max_batch_sequences=128
    )
    begin = time.perf_counter()
    with torch.no_grad():
        model = random_model(OPENLLAMA, kernels)
    runner = BenchRunner(model, kernels, config, eos_token_ids=frozenset({2}))
    setup = {
        "shape": "OpenLLaMA-7B, random NF4 weights",
        "step_tokens": config.max_batch_tokens,
        "sequences": config.max_batch_sequences,
        "slots": config.num_slots,
        "max_rank": config.max_lora_rank,
        "kv_tokens": config.num_pages * config.page_size,
    }
    start = {
        "what": "start",
        "s": round(time.perf_counter() - begin, 1),
        "graphs": runner.num_graphs,
        "graphs_gb": round(runner.graph_bytes / 1e9, 2),
        "graphs_gb_planned": round(_planned_graph_bytes(config) / 1e9, 2),
    }
    print(json.dumps({**machine(), **start, "setup": setup}), flush=True)
    engine = Engine(runner, Words())
    engine.start()
    plan = [(batch, 0.0, SETUPS[setup]) for batch in batches for setup in setups]
    plan += [(batch, temperature, SETUPS["base"]) for batch in sampled]
    for batch, heat, (name, count) in plan:
        adapters = min(count, batch)
        if count > 1 and adapters < count and not (count == 8 and batch == 8):
            continue
        refs = [AdapterRef(f"{name}{i}", 1, f"{name}{i}", Path("/")) for i in range(adapters)]
        for ref in refs:
            engine.preload(ref).result()
        best = max(
            (asyncio.run(_measure(engine, batch, refs, i, heat)) for i in range(2)),
            key=lambda r: r["decode_tok_s"],
        )
        rank, ms = RANKS[name], batch / best["decode_tok_s"] * 1e3
        floor_ms = step_bytes(model, batch, adapters, rank, runner.projections(name)) / read_tbps() / 1e9
        line = {
            **machine(),
            "what": "engine, decode",
            "batch": batch,
            "adapters": adapters,
            "rank": rank if adapters else 0,
            "modules": "" if not adapters else "all linear" if name == "all" else "q,k,v",
            "temperature": heat,
            "prompt_tokens": PROMPT,
            "output_tokens": OUTPUT,
            "setup": setup,
            **{key: round(value, 1) for key, value in best.items()},
            "ms_per_step": round(ms, 3),
            "roofline": round(floor_ms / ms, 3),
        }
        print(json.dumps(line), flush=True)
        for ref in refs:
            engine.unload(ref).result()
    ahead = runner._ahead
    print(json.dumps({"what": "steps started ahead", "started": ahead.num_started, "used": ahead.num_used}), flush=True)
    engine.stop(1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batches", nargs="*", type=int, default=[1, 8, 32, 64, 128])
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--sampled", nargs="*", type=int, default=[1, 32, 128], help="batches at that temperature")
    parser.add_argument("--setups", nargs="*", default=list(SETUPS), choices=list(SETUPS))
    options = parser.parse_args()
    main(options.batches, options.temperature, options.sampled, options.setups)
