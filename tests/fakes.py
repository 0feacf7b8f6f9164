"""Stand-ins for the device and the tokenizer: no torch, milliseconds, and a wrong answer for every wrong page.

`FakeRunner` keeps a KV cache of hashes. A token's entry depends on the adapter, the position and every token before
it, and is read back through the block table, so a page that is lost, shared wrongly or cached under the wrong adapter
changes the tokens. `expected_tokens` computes the same answer alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from onebase.errors import AdapterInvalid
from onebase_server.engine.runner import DeviceLost, HostAdapter, RunnerLimits, SampleRow, Scores, StepBatch, StepResult
from onebase_server.engine.types import AdapterRef, SamplingParams

EOS = 256
VOCAB = 300

_MASK = (1 << 61) - 1
_NO_KV = -1


def _mix(a: int, b: int) -> int:
    """A cheap hash of two numbers below 2**61."""
    value = (a * 6364136223846793005 + b * 1442695040888963407 + 1013904223) & _MASK
    return value ^ (value >> 29)


def _root(digest: str | None) -> int:
    return int.from_bytes(blake2b((digest or "base").encode(), digest_size=7).digest(), "little")


def _sample(summary: int, row: SampleRow) -> int:
    if row.sampling.temperature > 0:
        summary = _mix(_mix(summary, row.seed & _MASK), len(row.output_ids))
    if len(row.output_ids) >= row.sampling.min_tokens and summary % 23 == 0:
        return EOS
    return summary // 23 % 256


def expected_tokens(
    digest: str | None, prompt_ids: Sequence[int], sampling: SamplingParams, seed: int, max_tokens: int
) -> list[int]:
    """What FakeRunner answers to this prompt when nothing else is in the world, up to eos or `max_tokens`."""
    row = SampleRow(0, sampling, seed, tuple(prompt_ids))
    state, summary = _root(digest), 0
    for position, token in enumerate(prompt_ids):
        state = _mix(_mix(state, position), token)
        summary ^= state
    stops = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else {EOS})
    while len(row.output_ids) < max_tokens:
        token = _sample(summary, row)
        row.output_ids.append(token)
        if token in stops and len(row.output_ids) > sampling.min_tokens:
            break
        state = _mix(_mix(state, len(prompt_ids) + len(row.output_ids) - 1), token)
        summary ^= state
    return row.output_ids


def fake_adapter(name: str, version: int = 1, *, rank: int = 8) -> AdapterRef:
    """An adapter that FakeRunner can read; `rank` counts against its rows."""
    return AdapterRef(name, version, f"{name}@{version}", Path(f"/nowhere/{name}/{version}/{rank}"))


@dataclass(frozen=True)
class FakeHostAdapter:
    digest: str
    rank: int

    @property
    def nbytes(self) -> int:
        return self.rank * 100


Reply = Callable[[str | None, tuple[int, ...]], Sequence[int]]


class FakeRunner:
    """Implements `Runner`. `reply(digest, prompt_ids)` scripts the answers (eos follows); without it they are hashes.

    Knobs for faults: `broken` digests can't be read, `not_finite` ones are refused when their copy has arrived;
    `fail_next` is raised by the next step; `copy_polls` is how often `slot_ready` says no; the device is lost in the
    method that `lost_in` names.
    """

    def __init__(
        self,
        *,
        max_context: int = 512,
        page_size: int = 16,
        num_pages: int = 256,
        num_slots: int = 4,
        max_batch_tokens: int = 256,
        max_batch_sequences: int = 32,
        rows: int | None = None,
        copy_polls: int = 0,
        reply: Reply | None = None,
    ) -> None:
        self.limits = RunnerLimits(
            vocab_size=VOCAB,
            max_context=max_context,
            page_size=page_size,
            num_pages=num_pages,
            num_slots=num_slots,
            max_batch_tokens=max_batch_tokens,
            max_batch_sequences=max_batch_sequences,
            eos_token_ids=frozenset({EOS}),
        )
        self.rows = rows if rows is not None else 64 * num_slots
        self.copy_polls = copy_polls
        self.reply = reply
        self.logprob_of: Callable[[int], float] = lambda token: -0.5
        self.broken: set[str] = set()
        self.not_finite: set[str] = set()
        self.fail_next: Exception | None = None
        self.lost_in = ""
        self.num_failed = 0
        self.reads: list[str] = []
        self.batches: list[StepBatch] = []
        self.keep_batches = False
        self.live_states: set[int] = set()
        self._kv = [_NO_KV] * (num_pages * page_size)
        self._slots: dict[int, FakeHostAdapter] = {}
        self._polls: dict[int, int] = {}

    # Adapters

    def read_adapter(self, ref: AdapterRef) -> FakeHostAdapter:
        self.reads.append(ref.digest)
        if ref.digest in self.broken:
            raise AdapterInvalid(str(ref.path), [f"{ref.id} is broken"])
        # the last part of a `fake_adapter`'s path is its rank, of a version in a store its number
        rank = 8 if ref.path.parent.name == "versions" else int(ref.path.name)
        return FakeHostAdapter(ref.digest, rank)

    @property
    def used_rows(self) -> int:
        return sum(adapter.rank for adapter in self._slots.values())

    @property
    def loaded(self) -> dict[int, str]:
        """slot -> digest"""
        return {slot: adapter.digest for slot, adapter in self._slots.items()}

    def can_load(self, adapter: HostAdapter) -> bool:
        assert isinstance(adapter, FakeHostAdapter)
        return self.used_rows + adapter.rank <= self.rows

    def load_slot(self, slot: int, adapter: HostAdapter) -> None:
        assert isinstance(adapter, FakeHostAdapter)
        self._lose("load_slot")
        assert slot not in self._slots, "the slot is taken"
        assert 0 <= slot < self.limits.num_slots
        assert self.can_load(adapter), "rows have run out"
        self._slots[slot] = adapter
        self._polls[slot] = self.copy_polls

    def slot_ready(self, slot: int) -> bool:
        self._lose("slot_ready")
        self._polls[slot] -= 1
        is_ready = self._polls[slot] < 0
        if is_ready and (digest := self._slots[slot].digest) in self.not_finite:
            raise AdapterInvalid(digest, ["its values are not finite"])
        return is_ready

    def clear_slot(self, slot: int) -> None:
        self._lose("clear_slot")
        self._slots.pop(slot, None)

    def _lose(self, method: str) -> None:
        if self.lost_in == method:
            raise DeviceLost(f"an illegal address in {method}")

    # Steps

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        size = self.limits.page_size
        for source, target in pairs:
            self._kv[target * size : (target + 1) * size] = self._kv[source * size : (source + 1) * size]

    def release_state(self, state_id: int) -> None:
        self.live_states.discard(state_id)

    def run(self, batch: StepBatch) -> StepResult:
        self._check(batch)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            self.num_failed += 1
            raise error
        summaries = [self._forward(batch, index) for index in range(len(batch.slots))]
        tokens = []
        for row, index in zip(batch.rows, batch.sample_seqs.tolist(), strict=True):
            self.live_states.add(row.state_id)
            tokens.append(self._next_token(row, self._digest(int(batch.slots[index])), summaries[index]))
        top = [self._top(row, token) for row, token in zip(batch.rows, tokens, strict=True)]
        return StepResult(
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.array([self.logprob_of(token) for token in tokens], dtype=np.float32),
            top_ids=[None if ids is None else ids for ids in top],
            top_logprobs=[None if ids is None else np.full(len(ids), -0.5, dtype=np.float32) for ids in top],
            scores=self._score(batch) if len(batch.scored) else None,
        )

    def _score(self, batch: StepBatch) -> Scores:
        """The alternatives tell after which token they come."""
        count, top = len(batch.scored), batch.score_top
        said = batch.token_ids[batch.scored]
        ids = ((said[:, None] + np.arange(top, dtype=np.int32)) % VOCAB).astype(np.int32)
        logprobs = [self.logprob_of(token) for token in batch.score_targets.tolist()]
        values = np.full((count, top), -0.5, dtype=np.float32)
        return Scores(np.array(logprobs, dtype=np.float32), ids, values)

    def _digest(self, slot: int) -> str | None:
        return None if slot < 0 else self._slots[slot].digest

    def _forward(self, batch: StepBatch, index: int) -> int:
        """Write the KV of one sequence's tokens; the summary of its whole context."""
        size = self.limits.page_size
        pages = batch.block_tables[index].tolist()
        begin, end = int(batch.query_starts[index]), int(batch.query_starts[index + 1])
        context = int(batch.context_lens[index])
        start = context - (end - begin)
        places = [pages[position // size] * size + position % size for position in range(context)]
        state = self._kv[places[start - 1]] if start else _root(self._digest(int(batch.slots[index])))
        for offset, token in enumerate(batch.token_ids[begin:end].tolist()):
            state = _mix(_mix(state, start + offset), token)
            self._kv[places[start + offset]] = state
        summary = 0
        for place in places:
            summary ^= self._kv[place]
        return summary

    def _next_token(self, row: SampleRow, digest: str | None, summary: int) -> int:
        if self.reply is None:
            token = _sample(summary, row)
            while row.mask is not None and not row.mask[token // 32] >> token % 32 & 1:
                token = (token + 1) % VOCAB
            return token
        answer = self.reply(digest, row.prompt_ids)
        return answer[len(row.output_ids)] if len(row.output_ids) < len(answer) else EOS

    def _top(self, row: SampleRow, token: int) -> np.ndarray[Any, np.dtype[np.int32]] | None:
        count = row.sampling.top_logprobs
        return None if count is None else (np.arange(count, dtype=np.int32) + token) % VOCAB

    def _check(self, batch: StepBatch) -> None:
        """What every batch owes the device."""
        if self.keep_batches:
            self.batches.append(batch)
        counts = np.diff(batch.query_starts)
        assert len(batch.token_ids) == len(batch.positions) == counts.sum() <= self.limits.max_batch_tokens
        assert len(counts) == len(batch.context_lens) == len(batch.slots) == len(batch.block_tables)
        assert (counts > 0).all()
        assert len(set(batch.slots.tolist()) - {-1}) <= self.limits.num_slots
        states = [row.state_id for row in batch.rows]
        assert len(states) == len(set(states)) == len(batch.sample_seqs) <= self.limits.max_batch_sequences
        assert all(0 <= state < self.limits.max_batch_sequences for state in states)
        for slot in set(batch.slots.tolist()) - {-1}:
            assert slot in self._slots, "the slot holds no adapter"
            assert self._polls[slot] < 0, "the adapter is still being copied"


class OverlappingFakeRunner(FakeRunner):
    """Also `launch` and `collect`: the engine emits a step's tokens while the next one runs."""

    in_flight = False

    def launch(self, batch: StepBatch) -> object:
        assert not self.in_flight
        self.in_flight = True
        return batch

    def collect(self, ticket: object) -> StepResult:
        assert isinstance(ticket, StepBatch)
        self.in_flight = False
        return self.run(ticket)

    def release_state(self, state_id: int) -> None:
        assert not self.in_flight, "the step under way still uses the state"
        super().release_state(state_id)

    def clear_slot(self, slot: int) -> None:
        assert not self.in_flight, "the step under way still uses the slot"
        super().clear_slot(slot)


class FakeTokenizer:
    """One token a byte (ids 0..255), eos (256), and control tokens without text above."""

    vocab_size = VOCAB
    bos_id: int | None = None
    eos_id = EOS
    eos_ids = frozenset({EOS})
    pad_id = EOS + 1

    def encode(self, text: str, first: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(token) for token in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""


class ManualExecutor(Executor):
    """Runs what was submitted when it is told to, on the caller's thread."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.waiting.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future

    def run_one(self, index: int = 0) -> None:
        if self.waiting:
            self.waiting.pop(index % len(self.waiting))()

    def run_all(self) -> None:
        while self.waiting:
            self.run_one()


class ManualClock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
