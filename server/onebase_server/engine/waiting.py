"""The queue in front of the batch: by priority, then fair between adapters, then first come first served.

Fairness is start-time fair queueing (Goyal et al., SIGCOMM 1996): at arrival a sequence gets a start tag, one more
than the last of its adapter but no less than the tag admitted last. An adapter with a thousand requests waiting
spreads them over a thousand tags; a newcomer's first stands beside the first of these. Tags never change, so nobody
is overtaken for ever.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from onebase_server.engine.sequence import Sequence, SequenceStatus

MAX_PAST_TAGS = 256
"""Tags of adapters with nothing left to wait for are looked through when so many have gathered."""


def _turn(sequence: Sequence) -> tuple[int, float, int, int]:
    return sequence.turn


class WaitingQueue:
    """Sequences in state WAITING, in the order in which they should be admitted."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []
        self._virtual_time = 0.0
        self._next_tag: dict[str | None, float] = {}
        self._look_at = MAX_PAST_TAGS
        """How many tags there may be before the past ones are dropped."""

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def add(self, sequence: Sequence) -> None:
        """A new arrival: gets its tag."""
        adapter = sequence.group.request.adapter
        key = None if adapter is None else adapter.digest
        tag = max(self._virtual_time, self._next_tag.get(key, 0.0))
        self._next_tag[key] = tag + 1.0
        self._drop_past_tags()
        priority, arrival, index = sequence.order
        sequence.turn = (priority, tag, arrival, index)
        insort(self._items, sequence, key=_turn)

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence: keeps the tag of its arrival."""
        insort(self._items, sequence, key=_turn)

    def admitted(self, sequence: Sequence) -> None:
        """Note whose turn it was. The sequence itself goes at the next `sweep`."""
        self._virtual_time = max(self._virtual_time, sequence.turn[1])

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._items, sequence.turn, key=_turn)
        assert self._items[index] is sequence
        del self._items[index]
        self._forget_if_idle()

    def sweep(self) -> None:
        """Drop what is no longer WAITING."""
        self._items = [sequence for sequence in self._items if sequence.status is SequenceStatus.WAITING]
        self._forget_if_idle()

    def _drop_past_tags(self) -> None:
        """Under a load that never lets up the queue is never empty, and every version leaves a tag behind. One that
        the virtual time has passed says nothing that a missing one does not."""
        if len(self._next_tag) > self._look_at:
            self._next_tag = {key: tag for key, tag in self._next_tag.items() if tag > self._virtual_time}
            self._look_at = max(MAX_PAST_TAGS, 2 * len(self._next_tag))

    def _forget_if_idle(self) -> None:
        if not self._items:
            self._next_tag.clear()
