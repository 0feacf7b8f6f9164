"""Constrained decoding through the engine: masks before every token, one matcher a choice, errors to the request."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import EOS, FakeRunner, FakeTokenizer, ManualClock, ManualExecutor, OverlappingFakeRunner
from onebase.errors import EngineError, InvalidInput
from onebase_server.engine.engine import Engine
from onebase_server.engine.handle import RequestHandle, gather_choices
from onebase_server.engine.types import FinishReason, GenerationRequest, GrammarTrigger, SamplingParams


class WordMatcher:
    """Accepts one word, or any of several that share a beginning."""

    heeds_stops = True
    rules = True

    def __init__(self, words: list[bytes], said: bytes = b"") -> None:
        self.words = words
        self.said = said

    def fork(self) -> "WordMatcher":
        return WordMatcher(self.words, self.said)

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        mask[:] = 0
        for token in self._allowed():
            mask[token // 32] |= np.array(1 << token % 32, dtype=np.uint32).astype(np.int32)

    def accept(self, token_id: int) -> None:
        if token_id not in self._allowed():
            raise EngineError("not in the grammar")
        self.said += bytes([token_id])

    def _allowed(self) -> set[int]:
        rest = [word[len(self.said) :] for word in self.words if word.startswith(self.said)]
        return {word[0] if word else EOS for word in rest}


class WordBackend:
    """A grammar is its words, separated by `|`."""

    def compile(self, grammar: str, trigger: GrammarTrigger | None = None) -> WordMatcher:
        if not grammar:
            raise InvalidInput("an empty grammar", param="response_format")
        return WordMatcher([word.encode() for word in grammar.split("|")])


class Bench:
    def __init__(self, runner: FakeRunner | None = None) -> None:
        self.executor = ManualExecutor()
        self.engine = Engine(
            runner or FakeRunner(),
            FakeTokenizer(),
            grammar=WordBackend(),
            executor=self.executor,
            clock=ManualClock(),
        )

    def ask(self, grammar: str, n: int = 1, seed: int = 0) -> RequestHandle:
        sampling = SamplingParams(max_tokens=30, temperature=1.0, seed=seed, grammar=grammar)
        return self.engine.submit(GenerationRequest("r", (1, 2, 3), sampling, None, n))

    def run(self, handle: RequestHandle) -> list[str]:
        core = self.engine.core
        while not handle.is_finished:
            self.executor.run_all()
            core.serve()
            core.step()
        return [choice.text for choice in gather_choices(handle.take(), handle.request.n)]


def test_only_what_the_grammar_allows_is_said_and_its_end_ends_the_answer() -> None:
    bench = Bench()
    handle = bench.ask('{"a": 1}')
    assert bench.run(handle) == ['{"a": 1}']
    assert bench.engine.stats().finished[FinishReason.STOP] == 1


def test_every_choice_follows_a_matcher_of_its_own() -> None:
    bench = Bench()
    texts = bench.run(bench.ask("0ne|Pie|Pig|zoo", n=8))
    assert set(texts) <= {"0ne", "Pie", "Pig", "zoo"}
    assert len(set(texts)) > 1
    assert bench.engine.core.scheduler.pages.num_held == 0
    assert not bench.engine.core.constrained.sequences


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    bench = Bench()
    core = bench.engine.core
    handle = bench.ask("word")
    plain = bench.engine.submit(GenerationRequest("p", (1,), SamplingParams(max_tokens=1)))
    core.serve()
    core.step()
    assert plain.is_finished
    assert not handle.is_finished
    assert bench.run(handle) == ["word"]


def test_a_grammar_that_does_not_compile_fails_its_request_with_the_reason() -> None:
    bench = Bench()
    handle = bench.ask("", n=2)
    bench.engine.core.serve()
    bench.executor.run_all()
    bench.engine.core.serve()
    assert [type(event.error) for event in handle.take()] == [InvalidInput, InvalidInput]
    assert not bench.engine.core.has_requests


def test_a_request_cancelled_while_its_grammar_is_compiled_stays_ended() -> None:
    bench = Bench()
    handle = bench.ask("word")
    bench.engine.core.serve()
    handle.cancel()
    bench.engine.core.serve()
    bench.executor.run_all()
    bench.engine.core.serve()
    bench.engine.core.step()
    assert [event.finish_reason for event in handle.take()] == [FinishReason.CANCELLED]
    assert not bench.engine.core.constrained.sequences


class FailingMatcher(WordMatcher):
    """Its second mask can't be made."""

    def fork(self) -> "FailingMatcher":
        return FailingMatcher(self.words, self.said)

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        if self.said:
            raise EngineError("the grammar failed")
        super().fill_mask(mask)


@pytest.mark.parametrize("kind", [FakeRunner, OverlappingFakeRunner])
def test_a_mask_that_cannot_be_made_ends_its_request_only(
    kind: type[FakeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = kind()
    bench = Bench(runner)
    handle = bench.ask("word")
    other = bench.ask("other")
    core = bench.engine.core
    core.serve()
    monkeypatch.setattr(WordBackend, "compile", lambda self, grammar, trigger: FailingMatcher([b"word"]))
    bench.executor.run_one()
    monkeypatch.undo()
    assert bench.run(other) == ["other"]
    assert isinstance(handle.take()[-1].error, EngineError)
    assert not core.has_requests
    assert core.scheduler.pages.num_held == 0
    assert not runner.live_states


def test_masks_are_filled_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = OverlappingFakeRunner()
    bench = Bench(runner)
    fill, filled = WordMatcher.fill_mask, []

    def watch(self: WordMatcher, mask: NDArray[np.int32]) -> None:
        filled.append(runner.in_flight)
        fill(self, mask)

    monkeypatch.setattr(WordMatcher, "fill_mask", watch)
    assert bench.run(bench.ask("word")) == ["word"]
    assert filled == [True] * 5, "four letters and the end"


def test_a_token_outside_the_grammar_ends_its_request_only() -> None:
    bench = Bench(FakeRunner(reply=lambda digest, prompt: [ord("x")] * 5))
    handle = bench.ask("word")
    plain = bench.engine.submit(GenerationRequest("p", (1,), SamplingParams(max_tokens=3)))
    core = bench.engine.core
    while core.has_requests or not plain.is_finished:
        bench.executor.run_all()
        core.serve()
        core.step()
    assert isinstance(handle.take()[-1].error, EngineError)
    assert "".join(event.text for event in plain.take()) == "xxx"
