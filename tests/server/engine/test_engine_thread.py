"""The engine on its own thread: streams, leaving, slow readers, failures, stopping. Nobody is left waiting."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fakes import FakeRunner, FakeTokenizer, OverlappingFakeRunner, expected_tokens, fake_adapter
from onebase.errors import EngineError, InvalidInput, NotReady
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.engine import Engine
from onebase_server.engine.runner import DeviceLost, StepBatch, StepResult
from onebase_server.engine.sequence import resolve_seed
from onebase_server.engine.types import AdapterRef, FinishReason, GenerationRequest, SamplingParams


class PacedRunner(FakeRunner):
    """Runs as many steps as were allowed, then waits for more."""

    def __init__(self) -> None:
        super().__init__(max_context=10_000, num_pages=700)
        self._permits = threading.Semaphore(0)

    def allow(self, steps: int = 1_000_000) -> None:
        self._permits.release(steps)

    def run(self, batch: StepBatch) -> StepResult:
        self._permits.acquire()
        return super().run(batch)


@contextmanager
def running(runner: FakeRunner, config: EngineConfig | None = None) -> Iterator[Engine]:
    engine = Engine(runner, FakeTokenizer(), config)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def request(
    prompt: tuple[int, ...] = (1, 2, 3),
    *,
    adapter: AdapterRef | None = None,
    n: int = 1,
    max_tokens: int = 8,
    seed: int = 0,
    temperature: float = 0.0,
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
    return GenerationRequest("r", prompt, sampling, adapter, n)


def wait_until_idle(engine: Engine) -> None:
    """All that was submitted and cancelled is known and over, and so is the step that ended it."""
    engine.adapters().result()  # obeyed in turn, and between steps
    while engine.core.has_requests or engine.core.scheduler.running:
        time.sleep(0.001)
    engine.adapters().result()


@pytest.mark.parametrize("runner_type", [FakeRunner, OverlappingFakeRunner])
def test_many_concurrent_streams_each_get_their_own_adapter_s_answer(runner_type: type[FakeRunner]) -> None:
    async def ask(engine: Engine, index: int) -> None:
        adapter = fake_adapter(f"a{index % 6}") if index % 7 else None
        prompt = tuple(range(index % 5 + 1))
        asked = request(prompt, adapter=adapter, max_tokens=20, seed=index, temperature=1.0)
        [completion] = await engine.submit(asked).complete()
        digest = None if adapter is None else adapter.digest
        assert list(completion.token_ids) == expected_tokens(digest, prompt, asked.sampling, resolve_seed(index, 0), 20)

    async def ask_all(engine: Engine) -> None:
        await asyncio.gather(*(ask(engine, index) for index in range(40)))

    with running(runner_type()) as engine:
        asyncio.run(ask_all(engine))
        wait_until_idle(engine)
        assert engine.stats().pages_held == 0


def test_threads_may_submit_and_read_at_the_same_time() -> None:
    answers: list[bool] = []

    def ask(engine: Engine, index: int) -> None:
        for turn in range(5):
            asked = request((index, turn), adapter=fake_adapter(f"a{index}"))
            [completion] = engine.submit(asked).complete_blocking()
            alone = expected_tokens(f"a{index}@1", (index, turn), asked.sampling, 0, 8)
            answers.append(list(completion.token_ids) == alone)

    with running(FakeRunner()) as engine:
        threads = [threading.Thread(target=ask, args=(engine, index)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [True] * 40


def test_a_client_that_leaves_its_stream_frees_everything_within_a_step() -> None:
    async def leave(engine: Engine) -> None:
        events = engine.submit(request(max_tokens=5000, n=2)).events()
        await anext(events)
        await events.aclose()

    runner = PacedRunner()
    with running(runner) as engine:
        runner.allow(3)
        asyncio.run(leave(engine))
        runner.allow()
        wait_until_idle(engine)
        # Three were allowed before it left, and one more may have been waiting to run.
        assert engine.stats().num_steps <= 4
        assert engine.stats().pages_held == 0
        assert engine.stats().finished[FinishReason.CANCELLED] == 2


def test_a_cancelled_task_cancels_its_request() -> None:
    async def cancel(engine: Engine) -> None:
        task = asyncio.create_task(engine.submit(request(max_tokens=5000)).complete())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    runner = PacedRunner()
    with running(runner) as engine:
        runner.allow(1)
        asyncio.run(cancel(engine))
        runner.allow()
        wait_until_idle(engine)
        assert engine.stats().finished[FinishReason.CANCELLED] == 1


def test_cancel_may_be_called_at_any_time_and_again() -> None:
    runner = PacedRunner()
    with running(runner) as engine:
        handle = engine.submit(request(max_tokens=5000))
        for _ in range(3):
            handle.cancel()
        runner.allow()
        [completion] = handle.complete_blocking()
        assert completion.finish_reason is FinishReason.CANCELLED
        handle.cancel()


def test_a_slow_reader_gets_everything_in_few_events_and_holds_nobody_up() -> None:
    with running(FakeRunner()) as engine:
        slow = engine.submit(request(max_tokens=300, n=2))
        [quick] = engine.submit(request(max_tokens=300)).complete_blocking()
        wait_until_idle(engine)
        events = list(slow.iterate())
    assert len(events) == 2
    assert all(len(event.token_ids) == 300 for event in events)
    assert events[0].token_ids == quick.token_ids


def test_unread_events_are_bounded_whatever_is_generated() -> None:
    with running(FakeRunner()) as engine:
        handle = engine.submit(request(max_tokens=400))
        while not handle.is_finished:
            time.sleep(0.001)
        assert len(handle._unread[0]) <= 32
        assert len(handle.take()[0].token_ids) == 400


def test_a_runner_that_fails_once_fails_its_batch_and_serves_the_next_request() -> None:
    runner = FakeRunner()
    with running(runner) as engine:
        runner.fail_next = RuntimeError("boom")
        with pytest.raises(EngineError, match="boom"):
            engine.submit(request()).complete_blocking()
        assert engine.is_healthy
        assert engine.submit(request()).complete_blocking()


def test_a_lost_device_ends_the_engine_and_every_request_is_told() -> None:
    runner = PacedRunner()
    with running(runner) as engine:
        handles = [engine.submit(request(max_tokens=5000, n=2)), engine.submit(request(adapter=fake_adapter("a")))]
        runner.fail_next = DeviceLost("an illegal address")
        runner.allow()
        for handle in handles:
            with pytest.raises(EngineError, match="illegal address"):
                handle.complete_blocking()
        while engine.is_healthy:
            time.sleep(0.001)
        with pytest.raises(EngineError, match="illegal address"):
            engine.submit(request())
        with pytest.raises(EngineError):
            engine.preload(fake_adapter("b"))


@pytest.mark.parametrize("method", ["load_slot", "slot_ready", "clear_slot"])
def test_a_device_lost_while_an_adapter_is_loaded_ends_the_engine_and_marks_no_adapter(method: str) -> None:
    runner = FakeRunner(num_slots=1)
    with running(runner) as engine:
        engine.submit(request(adapter=fake_adapter("first"))).complete_blocking()  # its slot is cleared for the next
        runner.lost_in = method
        with pytest.raises(EngineError, match=r"the engine has stopped.*illegal address"):
            engine.submit(request(adapter=fake_adapter("a"))).complete_blocking()
        while engine.is_healthy:
            time.sleep(0.001)
        assert isinstance(engine.error, DeviceLost)
        assert [line.error for line in engine.core.residency.status()] == [None, None]


def test_a_device_lost_in_a_preload_fails_the_preload() -> None:
    runner = FakeRunner()
    runner.lost_in = "load_slot"
    with running(runner) as engine:
        with pytest.raises(EngineError, match="illegal address"):
            engine.preload(fake_adapter("a")).result()
        while engine.is_healthy:
            time.sleep(0.001)


def test_steps_that_fail_again_and_again_end_the_engine() -> None:
    class Broken(FakeRunner):
        def run(self, batch: StepBatch) -> StepResult:
            raise RuntimeError("boom")

    with running(Broken(), EngineConfig(max_failed_steps=3)) as engine:
        for _ in range(3):
            with pytest.raises(EngineError):
                engine.submit(request()).complete_blocking()
        while engine.is_healthy:
            time.sleep(0.001)


def test_an_engine_that_dies_of_its_own_fault_still_answers_everybody() -> None:
    class Faulty(FakeRunner):
        def release_state(self, state_id: int) -> None:
            raise ZeroDivisionError("outside any step")

    with running(Faulty()) as engine:
        handles = [engine.submit(request(n=3, max_tokens=400)) for _ in range(3)]
        handles[0].cancel()
        for handle in handles[1:]:
            with pytest.raises(EngineError, match="outside any step"):
                handle.complete_blocking()
        while engine.is_healthy:
            time.sleep(0.001)
        assert isinstance(engine.error, ZeroDivisionError)


def test_stopping_with_patience_lets_requests_finish_and_takes_no_new_ones() -> None:
    runner = PacedRunner()
    with running(runner) as engine:
        handle = engine.submit(request(max_tokens=50))
        stopper = threading.Thread(target=engine.stop, args=(3600.0,))
        stopper.start()
        while engine._is_accepting:
            time.sleep(0.001)
        with pytest.raises(NotReady):
            engine.submit(request())
        runner.allow()
        stopper.join()
        [completion] = handle.complete_blocking()
        assert completion.finish_reason is FinishReason.LENGTH


def test_stopping_at_once_ends_every_request_with_an_error() -> None:
    runner = PacedRunner()
    with running(runner) as engine:
        handles = [engine.submit(request(max_tokens=5000)), engine.submit(request(adapter=fake_adapter("a"), n=2))]
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        while engine._is_accepting:
            time.sleep(0.001)
        runner.allow()
        stopper.join()
        for handle in handles:
            with pytest.raises(NotReady):
                handle.complete_blocking()
        assert engine.is_healthy


def test_an_engine_that_never_started_stops_too() -> None:
    engine = Engine(FakeRunner(), FakeTokenizer())
    handle = engine.submit(request(n=2))
    done = engine.preload(fake_adapter("a"))
    engine.stop()
    with pytest.raises(NotReady):
        handle.complete_blocking()
    with pytest.raises(NotReady):
        done.result(0)
    with pytest.raises(NotReady):
        engine.submit(request())


def test_a_grammar_without_a_backend_is_refused() -> None:
    engine = Engine(FakeRunner(), FakeTokenizer())
    with pytest.raises(InvalidInput):
        engine.submit(GenerationRequest("r", (1,), SamplingParams(max_tokens=1, grammar="{}")))
    engine.stop()


def test_a_budget_smaller_than_the_batch_is_refused() -> None:
    with pytest.raises(InvalidInput, match="max_batch_tokens"):
        Engine(FakeRunner(max_batch_tokens=8, max_batch_sequences=16), FakeTokenizer())
