"""The engine over the real runner: any mix, order, chunking, cache state and preemption gives each request the same
tokens as when it is alone, at the default precision too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fakes import ManualClock, ManualExecutor
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.engine import Engine
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.runner_torch import TorchRunner
from onebase_server.engine.types import AdapterRef, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from tiny_models import peft_adapter, tiny_model

pytestmark = pytest.mark.slow

RANKS = (8, 3, 16, 5)
Asked = tuple[GenerationRequest, RequestHandle]


class Words:
    """Any id is a letter."""

    vocab_size = 320

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([97 + token_id % 26])


@pytest.fixture(scope="module")
def refs(models: Path) -> list[AdapterRef]:
    folder = models / "engine"
    return [
        AdapterRef(
            f"r{rank}", 1, f"r{rank}", peft_adapter(tiny_model(models, "llama"), folder, f"r{rank}", seed=rank, r=rank)
        )
        for rank in RANKS
    ]


@pytest.fixture(scope="module")
def runner(make_runner: Callable[..., TorchRunner]) -> TorchRunner:
    sizes = {"num_pages": 24, "num_slots": 2, "max_batch_tokens": 24, "max_batch_sequences": 6, "max_context": 128}
    return make_runner("llama", "native", torch.bfloat16, page_size=8, lora_rows=20, **sizes)


class Bench:
    """An engine driven by hand over a runner that outlives it."""

    def __init__(self, runner: TorchRunner, *, prefix_cache: bool = True) -> None:
        self.clock = ManualClock()
        self.executor = ManualExecutor()
        config = EngineConfig(prefix_cache=prefix_cache, fairness_wait_s=0.1, drain_limit_s=0.2, host_budget_bytes=0)
        self.engine = Engine(runner, Words(), config, executor=self.executor, clock=self.clock)

    def tick(self) -> None:
        self.clock.now += 0.01
        self.executor.run_all()
        self.engine.core.serve()
        self.engine.core.step()

    def finish(self, refs: list[AdapterRef]) -> None:
        """Run to the end; everything has come back then, the slots too."""
        core = self.engine.core
        for _ in range(3000):
            self.tick()
            if not core.has_requests:
                break
        assert not core.has_requests, "requests hang"
        assert core.counters.num_failed_steps == 0
        assert core.scheduler.pages.num_held == 0
        for ref in refs:
            self.engine.unload(ref)
        self.tick()
        assert core.residency.hosts.bytes == 0
        assert core.residency.slots.residents == []


_alone: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}


def answer_alone(runner: TorchRunner, refs: list[AdapterRef], request: GenerationRequest) -> list[tuple[int, ...]]:
    """The tokens of each choice with nothing else in the world, one prefill in one piece where it fits."""
    key = (request.prompt_ids, request.adapter, request.n, repr(request.sampling))
    if key not in _alone:
        bench = Bench(runner, prefix_cache=False)
        handle = bench.engine.submit(request)
        bench.finish(refs)
        _alone[key] = [event.token_ids for event in sorted(handle.take(), key=lambda event: event.index)]
    return _alone[key]


asks = st.fixed_dictionaries(
    {
        "which": st.integers(-1, len(RANKS) - 1),
        "length": st.sampled_from([1, 8, 33]),
        "family": st.integers(0, 1),
        "n": st.sampled_from([1, 3]),
        "max_tokens": st.sampled_from([1, 12]),
        "temperature": st.sampled_from([0.0, 1.0]),
    }
)
moves = st.one_of(asks, asks, st.integers(1, 12), st.sampled_from(["cancel", "unload"]))
quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate])


@settings(quiet, max_examples=20)
@given(script=st.lists(moves, min_size=4, max_size=20))
def test_tokens_are_those_of_the_same_request_alone(
    runner: TorchRunner, refs: list[AdapterRef], script: list[Any]
) -> None:
    bench = Bench(runner)
    asked: list[Asked] = []
    for move in script:
        if isinstance(move, dict):
            request = make_request(refs, **move)
            asked.append((request, bench.engine.submit(request)))
        elif isinstance(move, int):
            for _ in range(move):
                bench.tick()
        elif move == "cancel" and asked:
            asked[len(asked) // 2][1].cancel()
        elif move == "unload":
            bench.engine.unload(refs[len(asked) % len(refs)])
    bench.finish(refs)
    for request, handle in asked:
        events: list[TokenEvent] = sorted(handle.take(), key=lambda event: event.index)
        assert len(events) == request.n
        for event, alone in zip(events, answer_alone(runner, refs, request), strict=True):
            if event.finish_reason is FinishReason.CANCELLED:
                assert event.token_ids == alone[: len(event.token_ids)]
            else:
                assert event.token_ids == alone


def make_request(
    refs: list[AdapterRef], which: int, length: int, family: int, n: int, max_tokens: int, temperature: float
) -> GenerationRequest:
    prompt = tuple((family * 11 + index * 5) % 300 + 3 for index in range(length))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=7, presence_penalty=0.4)
    return GenerationRequest("r", prompt, sampling, None if which < 0 else refs[which], n)


def test_memory_that_torch_is_refused_costs_that_step_and_spoils_nothing(
    runner: TorchRunner, refs: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"length": 33, "n": 1, "max_tokens": 12, "temperature": 1.0}
    requests = [make_request(refs, which=which, family=which % 2, **shape) for which in (-1, 0, 1)]
    alone = [answer_alone(runner, refs, request) for request in requests]
    bench = Bench(runner)
    hurt = [bench.engine.submit(request) for request in requests]
    run = runner.run

    def starve(batch: Any) -> Any:
        run(batch)  # KV and the sampler's state are written by then
        return torch.empty(1 << 60, dtype=torch.uint8)

    for _ in range(6):
        bench.tick()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", starve)
        bench.tick()
    core = bench.engine.core
    assert core.counters.num_failed_steps == 1
    assert any(handle.is_finished for handle in hurt)
    healed = [bench.engine.submit(request) for request in requests]
    bench.tick()
    while core.has_requests:
        bench.tick()
    for handle, tokens in zip(healed, alone, strict=True):
        [event] = handle.take()
        assert [event.token_ids] == tokens
    ends = [event for handle in hurt for event in handle.take() if event.finish_reason is FinishReason.ERROR]
    assert ends
    assert all("can't allocate memory" in str(event.error) for event in ends)
    assert core.scheduler.pages.num_held == 0
