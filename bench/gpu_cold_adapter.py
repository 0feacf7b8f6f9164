"""A cold adapter on this GPU: from `submit` to the first token, its files on disk, over the same with it in its slot.

Real PEFT folders at OpenLLaMA-7B's shape (rank 8 on q, k, v, fp32), read by the runner's own `read_adapter` through
the real `Engine`; the files are in the page cache, as they were just written. PYTHONPATH=core:server:tests:bench.
"""

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from gpu_engine import OPENLLAMA
from gpu_serving import Words
from safetensors.torch import save_file

from cuda_models import random_model
from onebase_server.engine.engine import Engine
from onebase_server.engine.runner_cuda import CudaRunner
from onebase_server.engine.runner_torch import RunnerConfig
from onebase_server.engine.types import AdapterRef, GenerationRequest, SamplingParams
from onebase_server.kernels.cuda_ops import CudaKernels

RANK, PROMPT, COUNT = 8, 128, 10


def write_adapter(folder: Path, dtype: torch.dtype) -> None:
    g = OPENLLAMA
    tensors = {}
    for layer in range(g.layers):
        for name, out in (("q", g.heads), ("k", g.kv_heads), ("v", g.kv_heads)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
            tensors[key + "A.weight"] = (torch.randn(RANK, g.hidden) * 0.02).to(dtype)
            tensors[key + "B.weight"] = (torch.randn(out * g.head, RANK) * 0.02).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random",
        "r": RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


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


def measure(engine: Engine, runner: CudaRunner, refs: list[AdapterRef]) -> dict[str, object]:
    asyncio.run(first_token_ms(engine, refs[0], 0))  # captures the graphs
    cold = [asyncio.run(first_token_ms(engine, ref, i)) for i, ref in enumerate(refs[1:], 1)]
    warm = [asyncio.run(first_token_ms(engine, ref, i)) for i, ref in enumerate(refs[1:], 50)]
    for ref in refs:
        engine.unload(ref).result()
    again = [asyncio.run(first_token_ms(engine, ref, i)) for i, ref in enumerate(refs[1:], 100)]
    reads = []
    for ref in refs[1:5]:
        begin = time.perf_counter()
        runner.read_adapter(ref)
        reads.append((time.perf_counter() - begin) * 1e3)
    middle = statistics.median(warm)
    return {
        "cold_ms": round(statistics.median(cold), 2),
        "warm_ms": round(middle, 2),
        "cold_over_warm_ms": round(statistics.median(cold) - middle, 2),
        "worst_over_warm_ms": round(max(cold) - middle, 2),
        "cold_again_over_warm_ms": round(statistics.median(again) - middle, 2),
        "read_alone_ms": round(statistics.median(reads), 2),
    }


def main() -> None:
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
                **measure(engine, runner, refs),
            }
            print(json.dumps(line), flush=True)
            for ref in refs:
                engine.unload(ref).result()
    engine.stop(1.0)


if __name__ == "__main__":
    main()
