"""A whole engine over fakes, driven by hand: no threads, no time, so every interleaving can be had and repeated.

`World` submits, cancels, loads and steps as it is told, books what each request should have been answered, and
checks after each move that no page, slot, state or lease is counted wrongly.
"""

import codecs
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fakes import EOS, FakeRunner, FakeTokenizer, ManualClock, ManualExecutor, expected_tokens
from onebase.errors import OnebaseError
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.engine import Engine
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.sequence import SequenceStatus, resolve_seed
from onebase_server.engine.types import (
    AdapterRef,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)


def reference_text(token_ids: Sequence[int], stops: Sequence[str], min_tokens: int = 0) -> tuple[str, bool]:
    """Text of byte tokens up to the first stop string, the slow and obvious way; whether there was one.

    The text of the first `min_tokens` tokens can't be part of a stop string."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokenizer = FakeTokenizer()
    text, immune = "", 0
    for count, token in enumerate(token_ids, start=1):
        for char in decoder.decode(tokenizer.token_bytes(token)):
            text += char
            if count <= min_tokens:
                immune = len(text)
            begins = [len(text) - len(stop) for stop in stops if text.endswith(stop)]
            if any(begin >= immune for begin in begins):
                return text[: min(begin for begin in begins if begin >= immune)], True
    return text, False


@dataclass
class Asked:
    request: GenerationRequest
    handle: RequestHandle
    events: list[TokenEvent] = field(default_factory=list)

    def of(self, index: int) -> list[TokenEvent]:
        return [event for event in self.events if event.index == index]


class World:
    """One engine, one fake device, and everything that was asked of them."""

    def __init__(self, runner: FakeRunner, config: EngineConfig | None = None) -> None:
        self.runner = runner
        self.clock = ManualClock()
        self.executor = ManualExecutor()
        self.config = config or EngineConfig()
        self.engine = Engine(runner, FakeTokenizer(), self.config, executor=self.executor, clock=self.clock)
        self.core = self.engine.core
        self.asked: list[Asked] = []
        self.checks_ticks = True

    def ask(
        self,
        prompt_ids: Sequence[int],
        adapter: AdapterRef | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        deadline: float | None = None,
        max_tokens: int = 8,
        temperature: float = 0.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
        ignore_eos: bool = False,
        min_tokens: int = 0,
        owner: str | None = None,
    ) -> Asked:
        """Submit a request."""
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        request = GenerationRequest(
            str(len(self.asked)), tuple(prompt_ids), sampling, adapter, n, priority, deadline, owner
        )
        asked = Asked(request, self.engine.submit(request))
        self.asked.append(asked)
        return asked

    def tick(self) -> bool:
        """Obey commands and run one step; whether anything ran."""
        self.core.serve()
        ran = self.core.step()
        self._read()
        if self.checks_ticks:
            self.check()
        return ran

    def _read(self) -> None:
        for asked in self.asked:
            asked.events.extend(asked.handle.take())

    def settle(self, limit: int = 5_000) -> int:
        """Load everything and step until all requests have ended; how many ticks that took."""
        for count in range(limit):
            if all(asked.handle.is_finished for asked in self.asked) and not self.core.has_requests:
                self._read()
                return count
            self.executor.run_all()
            self.clock.now += 0.02
            self.tick()
        raise AssertionError(
            "requests hang: " + ", ".join(a.request.id for a in self.asked if not a.handle.is_finished)
        )

    # Laws

    def check(self) -> None:
        """Pages, places, slots and leases add up."""
        scheduler, residency = self.core.scheduler, self.core.residency
        pool = scheduler.pages
        held = Counter(page for sequence in scheduler.running for page in sequence.pages)
        for page, references in enumerate(pool._references):
            assert references == held[page], f"page {page}: {references} references, {held[page]} holders"
        assert len(pool._free) + len(pool._idle) + len(held) == pool.num_pages
        states = [sequence.row.state_id for sequence in scheduler.running]
        assert len(set(states)) == len(states) == self.runner.limits.max_batch_sequences - len(scheduler._free_states)
        assert scheduler.running == sorted(scheduler.running, key=lambda sequence: sequence.order)
        live = [s for group in self.core.requests.groups.values() for s in group.sequences if not s.is_closed]
        leases = Counter(s.residence.ref.digest for s in live if s.residence is not None)
        running = Counter(s.residence.ref.digest for s in scheduler.running if s.residence is not None)
        for entry in residency._known.values():
            assert entry.num_leases == leases[entry.ref.digest]
            assert entry.num_running == running[entry.ref.digest]
            assert entry.num_running == 0 or entry.slot is not None
        in_slots = {entry.slot: digest for digest, entry in residency.slots._entries.items()}
        assert in_slots == self.runner.loaded
        assert residency.hosts.bytes == sum(e.host.nbytes for e in residency.hosts.entries if e.host is not None)
        for sequence in live:
            assert sequence.status is not SequenceStatus.NEW
        queued = sum(group.request.n for group in self.core.requests.groups.values() if group.is_queued)
        assert self.engine.room.num_queued == sum(self.engine.room.queued_of.values()) >= queued
        waiting = scheduler.waiting
        assert len(waiting) == len(list(waiting)) == len(set(map(id, waiting)))
        assert {id(s) for s in waiting} == {id(s) for s in live if s.status is SequenceStatus.WAITING}

    def check_end(self) -> None:
        """Everything has come back, and every choice was answered once, with its own adapter's words."""
        self.check()
        assert self.core.counters.num_failed_steps == self.runner.num_failed, "a step failed by the engine's fault"
        assert not self.core.has_requests
        assert not self.core.scheduler.running
        assert not len(self.core.scheduler.waiting)
        assert self.core.scheduler.pages.num_held == 0
        assert self.engine.room.num_queued == 0
        assert not self.runner.live_states
        assert all(entry.num_leases == 0 for entry in self.core.residency._known.values())
        for asked in self.asked:
            for index in range(asked.request.n):
                self.check_choice(asked, index)

    def check_choice(self, asked: Asked, index: int) -> None:
        """One last event, and text that the same sequence alone would have got."""
        request, events = asked.request, asked.of(index)
        last = events[-1]
        assert last.finish_reason is not None
        assert all(event.finish_reason is None for event in events[:-1])
        assert last.usage is not None
        sampling = request.sampling
        alone = expected_tokens(
            None if request.adapter is None else request.adapter.digest,
            request.prompt_ids,
            sampling,
            resolve_seed(sampling.seed or 0, index),
            min(sampling.max_tokens, self.runner.limits.max_context - len(request.prompt_ids)),
        )
        ended_by_token = alone[-1] == EOS and not sampling.ignore_eos and len(alone) > sampling.min_tokens
        text, stopped = reference_text(alone, sampling.stop, sampling.min_tokens)
        got = "".join(event.text for event in events)
        ids = [token for event in events for token in event.token_ids]
        assert ids == alone[: len(ids)]
        if last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert got == text
            should_stop = stopped or ended_by_token
            assert last.finish_reason is (FinishReason.STOP if should_stop else FinishReason.LENGTH)
            if not stopped:
                assert ids == alone[: len(alone) - ended_by_token]
                assert last.usage.completion_tokens == len(alone)
        else:
            assert text.startswith(got)
            assert (last.error is not None) == (last.finish_reason is FinishReason.ERROR)
            assert last.error is None or isinstance(last.error, OnebaseError)
