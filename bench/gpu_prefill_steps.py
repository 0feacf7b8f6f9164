"""Steps with prefill through `CudaRunner` at OpenLLaMA-7B's shape on this GPU: in a graph and without one.

Some sequences decode, others bring new tokens, of prompts of which a part may be cached. Wall time of a step from its
batch to its sampled tokens, greedy, median of 15; both ways in turn. One JSON line a step.
Run with PYTHONPATH=core:server:tests:bench.
"""

import json
import random
import statistics
import time

import torch
from gpu_engine import OPENLLAMA
from gpu_setup import machine

from cuda_models import random_model
from gpu_runners import Sequence, make_batch, random_adapter
from onebase_server.engine import runner_cuda
from onebase_server.engine.runner import StepBatch
from onebase_server.engine.runner_cuda import CudaRunner
from onebase_server.engine.runner_torch import RunnerConfig
from onebase_server.kernels.cuda_ops import CudaKernels

STEPS = [  # decoding sequences of 128 tokens, prompts, new tokens of each, tokens cached before them
    (0, 1, 24, 0),
    (0, 1, 64, 0),
    (0, 1, 128, 0),
    (0, 1, 256, 0),
    (16, 1, 64, 0),
    (16, 1, 110, 0),
    (16, 2, 110, 0),
    (63, 1, 64, 0),
    (63, 1, 110, 0),
    (63, 1, 180, 0),
    (16, 1, 100, 128),
    (16, 1, 100, 256),
    (16, 1, 100, 512),
    (16, 1, 100, 1024),
]


def batch_of(decodes: int, prompts: int, new: int, cached: int, slot: int) -> StepBatch:
    rng, pages = random.Random(1), list(range(1500))
    live = []
    for state in range(decodes + prompts):
        length, computed = (cached + new, cached) if state >= decodes else (128, 127)
        sequence = Sequence(state, [rng.randrange(32000) for _ in range(length)], slot)
        sequence.computed = computed
        live.append(sequence)
    batch: StepBatch = make_batch(live, pages)
    return batch


def time_step(runner: CudaRunner, batch: StepBatch, most_reads: int) -> float:
    """Milliseconds."""
    runner_cuda.MOST_READS = most_reads
    for _ in range(3):
        runner.run(batch)
    times = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        runner.run(batch)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def main() -> None:
    kernels = CudaKernels()
    with torch.inference_mode():
        model = random_model(OPENLLAMA, kernels)
    config = RunnerConfig(num_pages=1500, num_slots=2, max_lora_rank=16, max_batch_tokens=2048, max_batch_sequences=128)
    begin = time.perf_counter()
    runner = CudaRunner(model, kernels, config, eos_token_ids=frozenset())
    took = round(time.perf_counter() - begin, 2)
    print(
        json.dumps({**machine(), "what": "start", "s": took, "graphs": runner.num_graphs, "bytes": runner.graph_bytes})
    )
    runner.load_slot(0, random_adapter(runner, 8, {"qkv"}))
    while not runner.slot_ready(0):
        time.sleep(0.01)
    for slot in (-1, 0):
        for decodes, prompts, new, cached in STEPS:
            batch = batch_of(decodes, prompts, new, cached, slot)
            line = {
                **machine(),
                "what": "step with prefill",
                "adapter": slot >= 0,
                "decodes": decodes,
                "prompts": prompts,
                "new_tokens_each": new,
                "cached_each": cached,
                "ms_graph": round(time_step(runner, batch, 1 << 40), 2),
                "ms_no_graph": round(time_step(runner, batch, 0), 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
