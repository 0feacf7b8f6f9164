"""Decode and prefill in process, without HTTP or scheduler: our runner over a grid of batches and adapters, and beside
it what users would otherwise run on the very same NF4 base: transformers' generate, PEFT's generate and mixed batch.

Cases take turns, round after round, so that whatever else the machine does hits all alike; the median and the best
round are reported. On a machine that others use too, `--clock cpu --threads 1` counts processor time instead.
One JSON line a case goes to the file given by --out.

    PYTHONPATH=core:server:tests:bench python bench/engine.py --base SmolLM2-135M-Instruct --baselines
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import Baselines
from random_adapters import MODULES, write_adapters

from onebase.base_model import load_base
from onebase.bases import resolve_base
from onebase.home import Home, default_home
from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner, build_runner
from onebase_server.engine.share_weights import share_on_file
from onebase_server.engine.types import AdapterRef
from onebase_server.kernels.cpu_build import load_library
from onebase_server.kernels.cpu_ops import CpuKernels
from onebase_server.kernels.ops import Kernels
from onebase_server.kernels.torch_ops import TorchKernels
from step_driver import Driver, Sequence

Clock = Callable[[], float]
Case = Callable[[], tuple[int, float]]
"""Runs once; returns tokens and seconds."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    home = Home(Path(options.home) if options.home else default_home(os.environ))
    warnings.simplefilter("ignore")  # PEFT looks for its base on the hub
    base = load_base(resolve_base(home, options.base), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(base.model, Path(folder), max(options.adapters), options.rank, options.modules)
        runner = load_runner(base, home, adapters, options)
        cases = engine_cases(runner, options, clock)
        if options.baselines:
            cases |= Baselines(base.model, adapters, options.prompt, options.steps, clock).cases()
        report(run_in_turns(cases, options.rounds), options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="SmolLM2-135M-Instruct")
    parser.add_argument("--home", default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8], help="distinct adapters in the batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", choices=list(MODULES), default="qkv")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--steps", type=int, default=32, help="decoding steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--torch-kernels", action="store_true", help="the plain torch twin instead of C++")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def load_runner(base: Any, home: Home, adapters: list[Path], options: argparse.Namespace) -> TorchRunner:
    library = None if options.torch_kernels else load_library(home.cache)
    kernels: Kernels = TorchKernels() if library is None else CpuKernels(library, base.compute_dtype)
    longest = max([*options.prefill, options.prompt + options.steps + 1])
    pages = max(options.batches) * (options.prompt + options.steps + 32) // 16 + 2 * longest // 16 + 64
    config = RunnerConfig(
        num_pages=pages,
        num_slots=len(adapters),
        max_lora_rank=options.rank,
        max_batch_tokens=max(512, longest),
        max_batch_sequences=max(options.batches),
        max_context=2048,
    )
    identity = base.spec.identity  # the weights lie where the server's would
    runner = build_runner(base, kernels, config, place=lambda w: share_on_file(w, kernels, identity, home.cache)[0])
    for slot, path in enumerate(adapters):
        runner.load_slot(slot, runner.read_adapter(AdapterRef(path.name, 1, path.name, path)))
    return runner


def engine_cases(runner: TorchRunner, options: argparse.Namespace, clock: Clock) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for batch in options.batches:
        for adapters in options.adapters:
            if adapters <= batch:
                slots = [i % adapters if adapters else -1 for i in range(batch)]
                cases[f"onebase decode batch={batch} adapters={adapters}"] = decode_case(runner, slots, options, clock)
    for length in options.prefill:
        cases[f"onebase prefill tokens={length}"] = prefill_case(runner, length, clock)
    return cases


def decode_case(runner: TorchRunner, slots: list[int], options: argparse.Namespace, clock: Clock) -> Case:
    """Greedy decoding of one sequence a slot after a prompt, prefill not counted."""

    def run() -> tuple[int, float]:
        driver = Driver(runner)
        sequences = [driver.add(Sequence(prompt(i, options.prompt), slot=slot)) for i, slot in enumerate(slots)]
        for sequence in sequences:
            driver.step([(sequence, options.prompt)])
        began = clock()
        for _ in range(options.steps):
            driver.step([(sequence, 1) for sequence in sequences])
        return options.steps * len(slots), clock() - began

    return run


def prefill_case(runner: TorchRunner, length: int, clock: Clock) -> Case:
    def run() -> tuple[int, float]:
        driver = Driver(runner)
        sequence = driver.add(Sequence(prompt(0, length)))
        began = clock()
        driver.step([(sequence, length)])
        return length, clock() - began

    return run


def prompt(seed: int, length: int) -> list[int]:
    return [(7919 * (i + 1) + 104729 * seed) % 40000 + 100 for i in range(length)]


def run_in_turns(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each case in each round; one round before does not count."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            tokens, seconds = case()
            if turn:
                rates[name].append(tokens / seconds)
    return rates


def report(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    setup = {
        "base": options.base,
        "rank": options.rank,
        "modules": options.modules,
        "prompt": options.prompt,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "clock": options.clock,
        "kernels": "torch" if options.torch_kernels else "c++",
        "cpu": platform.processor() or platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    lines = []
    for name, found in rates.items():
        figures = {"case": name, "tok_s": round(statistics.median(found), 1), "best_tok_s": round(max(found), 1)}
        lines.append(json.dumps(figures | setup))
        print(f"{figures['tok_s']:9.1f} tok/s (best {figures['best_tok_s']:9.1f})  {name}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
