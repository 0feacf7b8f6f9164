"""The whole server on this GPU, HTTP and all, against its engine alone: the same streams through both, in one process.

Random weights at OpenLLaMA-7B's shape behind the real app and uvicorn on loopback; the clients are processes of their
own (`onebase_server.loadtest`). `BASE`: a folder with config.json and a tokenizer.json of at most 32,000 tokens.
PYTHONPATH=core:server:tests:bench python bench/gpu_http.py BASE.
"""

import asyncio
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from onebase_server.loadtest.drive import Measured, Target, drive
from onebase_server.loadtest.workload import Workload, plan

CLIENTS, PROMPT, OUTPUT = 6, 110, 128


def rates(seen: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Tokens a second while decoding (each stream from its first text to its end), and over the whole."""
    tokens = sum(one["completion_tokens"] for one in seen)
    decoding = sum((one["completion_tokens"] - 1) / (one["finished_s"] - one["ttft_s"]) for one in seen)
    return {
        "decode_tok_s": round(decoding, 1),
        "end_to_end_tok_s": round(tokens / seconds, 1),
        "first_token_ms": round(sum(one["ttft_s"] for one in seen) / len(seen) * 1e3, 1),
        "prompt_tokens": round(sum(one["prompt_tokens"] for one in seen) / len(seen), 1),
    }


def client(url: str, model: str, count: int, seed: int, start_at: float, results: Any) -> None:
    workload = Workload((model,), count, count, None, PROMPT, OUTPUT, seed=seed)
    time.sleep(max(0.0, start_at - time.time()))
    seen, _ = asyncio.run(drive(Target(f"{url}/v1", extra_body={"ignore_eos": True}), workload))
    results.put([asdict(one) for one in seen])


def over_http(url: str, model: str, batch: int, round_: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    clients, start_at = min(CLIENTS, batch), time.time() + 1.5
    shares = [batch // clients + (i < batch % clients) for i in range(clients)]
    processes = [
        context.Process(target=client, args=(url, model, share, round_ * 100 + i, start_at, results))
        for i, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    replies = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    seen = [one for part in replies for one in part]
    failed = [one["error"] for one in seen if one["error"]]
    assert not failed, failed[:3]
    return rates(seen, max(one["started_s"] + one["finished_s"] for one in seen))


def in_engine(backend: Any, batch: int, round_: int) -> dict[str, float]:
    """The same prompts, rendered and submitted in this process."""
    from onebase.messages import Message
    from onebase_server.engine.types import GenerationRequest, SamplingParams

    renderer = backend.renderer(backend.base_format)
    shares = [batch // CLIENTS + (i < batch % CLIENTS) for i in range(CLIENTS)]
    planned = [
        request
        for i, share in enumerate(shares)
        for request in plan(Workload(("x",), share, share, None, PROMPT, OUTPUT, seed=round_ * 100 + i))
    ]
    prompts = [tuple(renderer.render_prompt([Message("user", request.prompt)])) for request in planned]
    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)

    async def one(index: int) -> dict[str, Any]:
        begin = time.perf_counter()
        seen = Measured("x", 0.0, prompt_tokens=len(prompts[index]))
        async for event in backend.engine.submit(
            GenerationRequest(f"{round_}-{index}", prompts[index], sampling)
        ).events():
            if event.token_ids and seen.ttft_s is None:
                seen.ttft_s = time.perf_counter() - begin
            seen.completion_tokens += len(event.token_ids)
        seen.finished_s = time.perf_counter() - begin
        return asdict(seen)

    async def all_of_them() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(one(i) for i in range(batch))))

    begin = time.perf_counter()
    return rates(asyncio.run(all_of_them()), time.perf_counter() - begin)


def make_runner(name: str, tokenizer: Any) -> Any:
    """`gpu`: the 7B shape; `fake`: no device, to try the script out."""
    if name == "fake":
        from fakes import FakeRunner

        runner = FakeRunner(num_pages=2048)
        runner.limits = replace(runner.limits, vocab_size=tokenizer.vocab_size)
        return runner
    import torch
    from gpu_engine import OPENLLAMA

    from cuda_models import random_model
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.engine.runner_torch import RunnerConfig
    from onebase_server.kernels.cuda_ops import CudaKernels

    assert tokenizer.vocab_size <= OPENLLAMA.vocab
    kernels = CudaKernels(Path("/tmp/onebase-cubins"))
    with torch.no_grad():
        model = random_model(OPENLLAMA, kernels)
    config = RunnerConfig(
        num_pages=128 * 17, num_slots=8, max_lora_rank=16, max_batch_tokens=2048, max_batch_sequences=128
    )
    return CudaRunner(model, kernels, config, eos_token_ids=tokenizer.eos_ids)


def main(base: Path, runner_name: str, batches: list[int]) -> None:
    from onebase.bases import BaseSpec
    from onebase.home import Home
    from onebase.manifest import BaseIdentity
    from onebase.tokenizer import TextTokenizer
    from onebase_server.compose import Server
    from onebase_server.loading import start_backend
    from onebase_server.settings import Settings
    from onebase_server.startup import allow_many_files, open_records, prepare_home

    tokenizer = TextTokenizer.load(base)
    runner = make_runner(runner_name, tokenizer)
    identity = BaseIdentity(id="bench", revision="local-0", config_hash="0" * 32, quantization="nf4-dq64")
    spec = BaseSpec("bench", base, identity, json.loads((base / "config.json").read_text()))
    with tempfile.TemporaryDirectory() as root:
        settings = Settings(home=Home(Path(root)), port=0, base_format="human_response", log_level="warning")
        prepare_home(settings.home)
        open_records(settings)
        allow_many_files()
        server = Server(settings, lambda given: start_backend(given, spec, runner, tokenizer))
        ended = threading.Event()

        def measure() -> None:
            try:
                server.loaded.wait(60)
                compare(server, batches, runner_name)
            finally:
                server.stop()
                ended.set()

        threading.Thread(target=measure, name="measure").start()
        server.run()
        ended.wait()


def compare(server: Any, batches: list[int], gpu: str) -> None:
    if gpu == "gpu":
        import torch

        gpu = torch.cuda.get_device_name()
    backend = server.deps.backend.get()
    httpx.get(f"{server.url}/healthz").raise_for_status()
    for batch in batches:
        alone = max((in_engine(backend, batch, i) for i in (1, 2)), key=lambda r: r["decode_tok_s"])
        whole = max((over_http(server.url, "bench", batch, i) for i in (3, 4)), key=lambda r: r["decode_tok_s"])
        line = {
            "gpu": gpu,
            "what": f"HTTP streams, {PROMPT} words + {OUTPUT} tokens, against the engine in the same process",
            "batch": batch,
            "adapters": 0,
            "clients": CLIENTS,
            "http": whole,
            "engine": alone,
            "http_over_engine": round(whole["decode_tok_s"] / alone["decode_tok_s"], 3),
            "end_to_end_http_over_engine": round(whole["end_to_end_tok_s"] / alone["end_to_end_tok_s"], 3),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(b) for b in sys.argv[3:]] or [32, 64])
