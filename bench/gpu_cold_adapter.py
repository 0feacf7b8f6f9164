"""A cold adapter on this GPU: from `submit` to the first token, its files on disk, over the same with it in its slot.

Real PEFT folders at OpenLLaMA-7B's shape (rank 8 on q, k, v), read by the runner's own `read_adapter` through the real
`Engine`; the files are in the page cache, as they were just written. A line of the whole and one of its parts for each
dtype. PYTHONPATH=core:server:tests:bench.
"""

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cold_parts import LAYOUT, RANK, Parts, host_parts, set_alpha, write_adapter
from gpu_engine import OPENLLAMA
from gpu_serving import Words

from cuda_models import random_model
from onebase_server.engine.engine import Engine
from onebase_server.engine.runner_cuda import CudaRunner
from onebase_server.engine.runner_torch import RunnerConfig
from onebase_server.engine.slot_loader import StreamLoader
from onebase_server.engine.types import AdapterRef, GenerationRequest, SamplingParams
from onebase_server.kernels.cuda_ops import CudaKernels

PROMPT, COUNT = 128, 10


async def first_token_ms(engine: Engine, ref: AdapterRef, round_: int) -> float:
    """Each prompt is new, so that no prefix of it is cached."""
    prompt = tuple((round_ * 977 + 31 * i) % 30000 + 5 for i in range(PROMPT))
    request = GenerationRequest(
        f"{ref.digest}-{round_}", prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True), adapter=ref
    )
    begin, first = time.perf_counter(), None
    async for event in engine.submit(request).events():
        if first is None and event.token_ids:
            first = time.perf_counter() - begin
    assert first is not None
    return first * 1e3


def measure(engine: Engine, refs: list[AdapterRef]) -> dict[str, object]:
    asyncio.run(first_token_ms(engine, refs[0], 0))  # captures the graphs
    cold = [asyncio.run(first_token_ms(engine, ref, i)) for i, ref in enumerate(refs[1:], 1)]
    warm = [asyncio.run(first_token_ms(engine, ref, i)) for i, ref in enumerate(refs[1:], 50)]
    for number, ref in enumerate(refs):
        engine.unload(ref).result()
        set_alpha(ref.path, 50 + number)
    fresh = [asyncio.run(first_token_ms(engine, ref, i)) for i, ref in enumerate(refs[1:], 100)]
    middle = statistics.median(warm)
    return {
        "cold_ms": round(statistics.median(cold), 2),
        "warm_ms": round(middle, 2),
        "cold_over_warm_ms": round(statistics.median(cold) - middle, 2),
        "worst_over_warm_ms": round(max(cold) - middle, 2),
        "cold_new_recipe_over_warm_ms": round(statistics.median(fresh) - middle, 2),
    }


def device_parts(runner: CudaRunner, folders: list[Path]) -> Parts:
    """`enqueue`: the engine thread's part of a load. `load`: from its begin until the slot is ready; `_ordinary`: of
    bytes that the arena had no room for; `load_bytes`: the device's own time for the bytes. The engine must be idle."""
    loader, parts = runner._loader, Parts()
    assert isinstance(loader, StreamLoader)
    for ordinary in (False, True):
        suffix = "_ordinary" if ordinary else ""
        for folder in folders:
            packed = loader.read(folder)
            if ordinary:
                packed.block.tensor = packed.block.tensor.clone()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            parts.take(f"enqueue{suffix}", loader.load, 0, packed)
            while not loader.is_ready(0):
                pass
            parts.note(f"load{suffix}", (time.perf_counter() - begin) * 1e3)
            loader.clear(0)
            parts.note(f"load_bytes{suffix}", _bytes_ms(loader, packed.block.tensor))
    return parts


def _bytes_ms(loader: StreamLoader, data: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    loader._scratch[: len(data)].copy_(data, non_blocking=True)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> None:
    assert LAYOUT.offsets["gate_up"][1] == OPENLLAMA.inner
    kernels = CudaKernels(Path("/tmp/onebase-cubins"))
    with torch.no_grad():
        model = random_model(OPENLLAMA, kernels)
    config = RunnerConfig(num_pages=512, num_slots=32, max_lora_rank=16, max_batch_tokens=2048, max_batch_sequences=2)
    runner = CudaRunner(model, kernels, config, eos_token_ids=frozenset({2}))
    engine = Engine(runner, Words())
    engine.start()
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as root:
            refs = []
            for i in range(COUNT + 1):
                write_adapter(Path(root, f"a{i}"), dtype)
                refs.append(AdapterRef(f"a{i}", 1, f"{dtype}-{i}", Path(root, f"a{i}")))
            line = {
                "gpu": torch.cuda.get_device_name(),
                "what": "cold adapter to first token, over warm",
                "rank": RANK,
                "modules": "q,k,v",
                "files": f"{str(dtype).removeprefix('torch.')}, page cache warm",
                "adapters": COUNT,
                **measure(engine, refs),
            }
            print(json.dumps(line), flush=True)
            for ref in refs:
                engine.unload(ref).result()
            folders = [ref.path for ref in refs[1:]]
            loader = runner._loader
            assert isinstance(loader, StreamLoader)
            host = host_parts(folders, loader._memory, loader.chunk_bytes)
            parts = {**host.medians(), **device_parts(runner, folders).medians()}
            print(json.dumps({**dict(list(line.items())[:6]), "what": "cold adapter by parts", **parts}), flush=True)
    engine.stop(1.0)


if __name__ == "__main__":
    main()
