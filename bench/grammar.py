"""What constrained decoding costs: decode steps of the whole engine, without HTTP, with 1, 8 and 32 requests that must
be JSON of a schema, beside as many that may say anything. And where it goes: filling the masks, and applying them.

Cases take turns as in bench/engine.py, whose line the results have. On a machine that others use, `--clock cpu
--threads 1` counts processor time instead.

    PYTHONPATH=core:server:tests:bench python bench/grammar.py --base SmolLM2-135M-Instruct
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import Case, Clock, load_runner, prompt, report, run_in_turns

from fakes import ManualExecutor
from onebase.base_model import load_base
from onebase.bases import resolve_base
from onebase.home import Home, default_home
from onebase_server.engine.engine import Engine
from onebase_server.engine.grammar_llguidance import LlguidanceBackend, json_grammar
from onebase_server.engine.logit_edits import apply_edits
from onebase_server.engine.runner import SampleRow
from onebase_server.engine.runner_torch import TorchRunner
from onebase_server.engine.types import GenerationRequest, SamplingParams

STRINGS = {"type": "object", "properties": {"names": {"type": "array", "minItems": 999, "items": {"type": "string"}}}}
GRAMMAR = json_grammar({**STRINGS, "required": ["names"], "additionalProperties": False}, param="schema")
"""Never at its end within a round; both wide masks (in a string) and narrow ones (between two)."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    home = Home(Path(options.home) if options.home else default_home(os.environ))
    base = load_base(resolve_base(home, options.base), "cpu")
    runner = load_runner(base, home, [], options)
    backend = LlguidanceBackend(base.tokenizer)
    cases: dict[str, Case] = {}
    for count in options.batches:
        for kind, grammar in (("free", None), ("json", GRAMMAR)):
            cases[f"engine {kind} requests={count}"] = decode_case(
                runner, base.tokenizer, backend, grammar, count, options, clock
            )
        cases[f"masks filled requests={count}"] = fill_case(backend, base.tokenizer, count, options, clock)
        cases[f"masks applied requests={count}"] = apply_case(base.tokenizer.vocab_size, count, options, clock)
    report(run_in_turns(cases, options.rounds), options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="SmolLM2-135M-Instruct")
    parser.add_argument("--home", default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="decoding steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.prefill, options.rank, options.modules, options.torch_kernels = [], 8, "none", False
    return options


def decode_case(
    runner: TorchRunner,
    tokenizer: Any,
    backend: LlguidanceBackend,
    grammar: str | None,
    count: int,
    options: argparse.Namespace,
    clock: Clock,
) -> Case:
    """The engine by hand: all prompts first, then `steps` steps that count."""

    def run() -> tuple[int, float]:
        executor = ManualExecutor()
        engine = Engine(runner, tokenizer, grammar=backend, executor=executor)
        core = engine.core
        sampling = SamplingParams(max_tokens=options.steps + 8, seed=1, grammar=grammar, ignore_eos=grammar is None)
        for i in range(count):
            engine.submit(GenerationRequest(str(i), tuple(prompt(i, options.prompt)), sampling))
        core.serve()
        executor.run_all()
        while len(core.scheduler.waiting) or any(s.num_computed < options.prompt for s in core.scheduler.running):
            core.serve()
            core.step()
        began, before = clock(), core.counters.generated_tokens
        for _ in range(options.steps):
            core.serve()
            core.step()
        took, tokens = clock() - began, core.counters.generated_tokens - before
        while core.has_requests:
            core.serve()
            core.step()
        assert tokens == count * options.steps, "a request ended within the round"
        return tokens, took

    return run


def fill_case(
    backend: LlguidanceBackend, tokenizer: Any, count: int, options: argparse.Namespace, clock: Clock
) -> Case:
    """What is done while the device works: the masks of `count` matchers, and the tokens accepted in between."""
    said = tokenizer.encode('{"names": ["Alice in Wonderland"' + ', "Bob", "the third of all"' * 9)[: options.steps]

    def run() -> tuple[int, float]:
        matchers = [backend.compile(GRAMMAR) for _ in range(count)]
        mask = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
        began = clock()
        for token in said:
            for matcher in matchers:
                matcher.fill_mask(mask)
                matcher.accept(token)
        return len(said) * count, clock() - began

    return run


def apply_case(vocab_size: int, count: int, options: argparse.Namespace, clock: Clock) -> Case:
    mask = np.full(-(-vocab_size // 32), 0x0F0F0F0F, dtype=np.int32)
    rows = [SampleRow(i, SamplingParams(max_tokens=1), 0, (), mask=mask) for i in range(count)]

    def run() -> tuple[int, float]:
        logits = torch.zeros(count, vocab_size)
        began = clock()
        for _ in range(options.steps):
            apply_edits(logits, rows, {}, frozenset())
        return options.steps * count, clock() - began

    return run


if __name__ == "__main__":
    main()
