"""A decode step started before the engine has asked for it, so that the device never waits for Python.

While nothing changes, the next step is this one moved on by one token, and the device has all it needs. The engine's
next batch is then compared with what was foreseen; a sequence that has ended is left out, anything else new throws the
started step away (what it wrote lies beyond every sequence's tokens). Knows arrays and events, not graphs or kernels.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onebase_server.engine.runner import Int32, StepBatch

_STEADY = 3
"""Steps of the same sequences before one is started ahead: under churn it would be thrown away."""


@dataclass(slots=True)
class Started:
    """The step after `batch`, under way."""

    batch: StepBatch
    fetched: Any  # where its choices arrive
    done: Any  # event
    tokens: Int32 | None = None
    """What `batch` chose, its inputs."""
    places: Int32 | None = None
    ended: set[int] = field(default_factory=set)
    """States of `batch` whose sequences have ended: a new one under the same number is another sequence."""


class RunAhead:
    """At most one step. Engine thread only."""

    def __init__(self, page_size: int, max_context: int) -> None:
        self._page_size = page_size
        self._max_context = max_context
        self._started: Started | None = None
        self._states: list[int] = []
        self._steady = 0
        self.num_started = 0
        self.num_used = 0

    def forget(self) -> None:
        """What was started is of no use; begin to count anew."""
        self._started = None
        self._states = []
        self._steady = 0

    def release(self, state_id: int) -> None:
        """The sequence with this state has ended; its rows are not kept longer than the others'."""
        if state_id in self._states:
            self._states, self._steady = [], 0
        if self._started is not None:
            self._started.ended.add(state_id)
            if all(row.state_id in self._started.ended for row in self._started.batch.rows):
                self._started = None

    def take(self, batch: StepBatch) -> Started | None:
        """The started step if it is this batch, or this batch and sequences that have ended."""
        started, self._started = self._started, None
        if started is None or started.tokens is None:
            return None
        places = _places(started, batch)
        if places is None:
            self._steady = 0
            return None
        self.num_used += 1
        started.places = places
        return started

    def may_start(self, batch: StepBatch, plain: bool, taken: Started | None) -> bool:
        """Whether the step after `batch` can and should be started now. `taken`: what `take` returned for `batch`."""
        states = [row.state_id for row in batch.rows]
        self._steady = self._steady + 1 if states == self._states else 0
        self._states = states
        # The device goes on in the order of the step before: only an unchanged batch may follow a step that was taken.
        places = None if taken is None else taken.places
        whole = taken is None or (places is not None and np.array_equal(places, np.arange(len(taken.batch.slots))))
        if not plain or not whole or self._steady < _STEADY or len(states) != len(batch.slots):
            return False
        following = batch.positions + 1
        return bool((following % self._page_size).all()) and int(following.max()) < self._max_context

    def put(self, batch: StepBatch, fetched: Any, done: Any) -> None:
        self._started = Started(batch, fetched, done)
        self.num_started += 1

    def note(self, batch: StepBatch, tokens: Int32) -> None:
        """`batch` has chosen these tokens, one a sequence."""
        if self._started is not None and self._started.batch is batch:
            self._started.tokens = tokens


def _places(started: Started, batch: StepBatch) -> Int32 | None:
    """Where each sequence of `batch` is in the started step, or None if it is another step."""
    before = started.batch
    at = {
        row.state_id: i
        for i, row in zip(before.sample_seqs.tolist(), before.rows, strict=True)
        if row.state_id not in started.ended
    }
    order = [at.get(row.state_id, -1) for row in batch.rows]
    if -1 in order or len(order) != len(batch.slots) or batch.sample_seqs.tolist() != list(range(len(order))):
        return None
    places = np.array(order, dtype=np.int32)
    width = min(batch.block_tables.shape[1], before.block_tables.shape[1])
    assert started.tokens is not None
    same = (
        np.array_equal(batch.positions, before.positions[places] + 1)
        and np.array_equal(batch.token_ids, started.tokens[places])
        and np.array_equal(batch.slots, before.slots[places])
        and np.array_equal(batch.block_tables[:, :width], before.block_tables[places, :width])
    )
    return places if same else None
