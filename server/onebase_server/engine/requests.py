"""The requests that are being answered: who is there, until when, and how each ends. Engine thread only.

Ending has two moments: a sequence gets its last event (`Emitter`), and what it held comes back. They are one, but for
a sequence that a stop string ends while a step still works on its pages: what it holds comes back after that step.
"""

import heapq
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from onebase.errors import DeadlineExceeded
from onebase_server.engine.emitter import Emitter
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.sequence import RequestGroup, Sequence
from onebase_server.engine.stats import Counters
from onebase_server.engine.types import FinishReason, GenerationRequest

logger = logging.getLogger(__name__)


class OpenRequests:
    """`give_back(sequence)` takes what an ended sequence held, once for each; `on_unqueued`: a request has left the
    queue for good."""

    def __init__(
        self,
        counters: Counters,
        give_back: Callable[[Sequence], None],
        on_unqueued: Callable[[GenerationRequest], None],
        clock: Callable[[], float],
    ) -> None:
        self._counters = counters
        self._give_back = give_back
        self._on_unqueued = on_unqueued
        self._clock = clock
        self.emitter = Emitter(self._on_close)
        self.groups: dict[RequestHandle, RequestGroup] = {}
        self._deadlines: list[tuple[float, int, RequestGroup]] = []
        self._closed_in_flight: list[Sequence] | None = None
        """Sequences that ended while a step runs, until it is collected; None between steps."""

    def add(self, group: RequestGroup) -> None:
        self.groups[group.handle] = group
        self._counters.prompt_tokens += len(group.request.prompt_ids)
        if group.request.deadline is not None:
            heapq.heappush(self._deadlines, (group.request.deadline, group.sequences[0].order[1], group))

    def admitted(self, sequence: Sequence) -> None:
        """A sequence gets its place in the batch, the first time or again."""
        group = sequence.group
        if group.is_queued:
            self._leave_queue(group)
            self._counters.cached_tokens += sequence.cached_tokens or 0
            waited = self._clock() - group.submitted_at
            self._counters.waits_s.add(waited)
            group.handle.queue_s = waited

    # Deadlines

    @property
    def next_deadline(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now: float) -> None:
        """End those whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= now:
            group = heapq.heappop(self._deadlines)[2]
            self.end_group(group, FinishReason.ERROR, DeadlineExceeded("the request's deadline has passed"))

    # Ends

    def end_group(self, group: RequestGroup, reason: FinishReason, error: Exception | None = None) -> None:
        for sequence in group.sequences:
            self.end(sequence, reason, error)

    def end(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """End a sequence outside a step, unless it has ended already (its last event may still be on its way)."""
        if sequence.finish is None:
            self.emitter.close(sequence, reason, error)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        self.end(sequence, FinishReason.ERROR, error)

    def fail_all(self, cause: Exception) -> None:
        """The engine ends: whoever has not had a last event gets it, whatever state things are in."""
        for group in list(self.groups.values()):
            for sequence in group.sequences:
                if not sequence.is_closed:
                    try:
                        self.emitter.close(sequence, FinishReason.ERROR, cause)
                    except Exception:
                        logger.exception("could not free a sequence of request %s", group.request.id)

    @contextmanager
    def step_in_flight(self) -> Iterator[None]:
        """While a step runs on the device: who ends meanwhile gives back what it holds afterwards."""
        self._closed_in_flight = []
        try:
            yield
        finally:
            closed, self._closed_in_flight = self._closed_in_flight, None
            for sequence in closed:
                self._release(sequence)

    def _on_close(self, sequence: Sequence) -> None:
        if self._closed_in_flight is None:
            self._release(sequence)
        else:
            self._closed_in_flight.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        assert sequence.finish is not None
        self._counters.finished[sequence.finish] += 1
        group = sequence.group
        group.num_open -= 1
        if group.num_open == 0:
            self._forget(group)

    def _forget(self, group: RequestGroup) -> None:
        self._leave_queue(group)
        del self.groups[group.handle]
        group.sequences = []  # they point back at it: all of a request would wait for the garbage collector
        self._counters.note_duration(self._clock() - group.submitted_at)
        if len(self._deadlines) > 2 * len(self.groups) + 64:
            self._deadlines = [item for item in self._deadlines if item[2].num_open]
            heapq.heapify(self._deadlines)

    def _leave_queue(self, group: RequestGroup) -> None:
        if group.is_queued:
            group.is_queued = False
            self._on_unqueued(group.request)
