"""The queue in front of the batch: by priority, fair between owners, then adapters, then first come first served.

Fairness is start-time fair queueing (Goyal et al., SIGCOMM 1996), twice. Owners take turns: each place in the batch
costs its owner one turn, and who comes anew stands beside whoever is next, however many the others have waiting.
Within one owner's line a sequence gets a start tag at arrival, one more than the last of its adapter but no less than
the tag admitted last: an adapter with a thousand requests waiting spreads them over a thousand tags, and a newcomer's
first stands beside the first of these. Tags never change, so nobody is overtaken for ever.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

from onebase_server.engine.sequence import Sequence, SequenceStatus

MAX_PAST_TAGS = 256
"""Tags of adapters with nothing left to wait for, and lines of such owners, are looked through when so many have
gathered."""


def _turn(sequence: Sequence) -> tuple[int, float, int, int]:
    return sequence.turn


class OwnersLine:
    """One owner's sequences in state WAITING, in the order in which they should be admitted."""

    def __init__(self, tag: float) -> None:
        self.items: list[Sequence] = []
        self.tag = tag
        """Of its first sequence among the owners'; the next one's is one more."""
        self._virtual_time = 0.0
        self._next_tag: dict[str | None, float] = {}
        self._look_at = MAX_PAST_TAGS
        """How many tags there may be before the past ones are dropped."""

    def add(self, sequence: Sequence) -> None:
        adapter = sequence.group.request.adapter
        key = None if adapter is None else adapter.digest
        tag = max(self._virtual_time, self._next_tag.get(key, 0.0))
        self._next_tag[key] = tag + 1.0
        self._drop_past_tags()
        priority, arrival, index = sequence.order
        sequence.turn = (priority, tag, arrival, index)
        insort(self.items, sequence, key=_turn)

    def admitted(self, sequence: Sequence) -> None:
        """Note whose turn it was."""
        self._virtual_time = max(self._virtual_time, sequence.turn[1])

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self.items, sequence.turn, key=_turn)
        assert self.items[index] is sequence
        del self.items[index]

    def sweep(self) -> None:
        """Drop what is no longer WAITING."""
        self.items = [sequence for sequence in self.items if sequence.status is SequenceStatus.WAITING]

    def _drop_past_tags(self) -> None:
        """Under a load that never lets up the line is never empty, and every version leaves a tag behind. One that
        the virtual time has passed says nothing that a missing one does not."""
        if len(self._next_tag) > self._look_at:
            self._next_tag = {key: tag for key, tag in self._next_tag.items() if tag > self._virtual_time}
            self._look_at = max(MAX_PAST_TAGS, 2 * len(self._next_tag))


class WaitingQueue:
    """Sequences in state WAITING. Iterating gives them in the order in which they should be admitted now."""

    def __init__(self) -> None:
        self._lines: dict[str | None, OwnersLine] = {}
        self._count = 0
        self._virtual_time = 0.0
        self._look_at = MAX_PAST_TAGS

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """Each owner's next stands one turn behind its last. The queue may change meanwhile; the order stays."""
        lines = [(line.tag, list(line.items)) for line in self._lines.values() if line.items]
        if len(lines) == 1:
            yield from lines[0][1]
            return
        heads = [(items[0].order[0], tag, *items[0].order[1:], 0, items) for tag, items in lines]
        heapq.heapify(heads)  # arrival and index are one sequence's alone: what stands behind is never compared
        while heads:
            _, tag, _, _, place, items = heads[0]
            yield items[place]
            place += 1
            if place < len(items):
                priority, arrival, index = items[place].order
                heapq.heapreplace(heads, (priority, tag + 1.0, arrival, index, place, items))
            else:
                heapq.heappop(heads)

    def add(self, sequence: Sequence) -> None:
        """A new arrival."""
        self._line_of(sequence).add(sequence)
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence: keeps the tag of its arrival."""
        insort(self._line_of(sequence).items, sequence, key=_turn)
        self._count += 1

    def started(self, sequence: Sequence) -> None:
        """A sequence gets its place, from the queue (it goes at the next `sweep`) or beside the first of its choices:
        one turn of its owner's is spent."""
        line = self._line_of(sequence)
        if sequence.status is SequenceStatus.WAITING:
            self._virtual_time = max(self._virtual_time, line.tag)
            line.admitted(sequence)
        line.tag += 1.0

    def remove(self, sequence: Sequence) -> None:
        self._line_of(sequence).remove(sequence)
        self._count -= 1
        self._forget_if_idle()

    def sweep(self) -> None:
        """Drop what is no longer WAITING."""
        for line in self._lines.values():
            line.sweep()
        self._count = sum(len(line.items) for line in self._lines.values())
        self._forget_if_idle()

    def _line_of(self, sequence: Sequence) -> OwnersLine:
        owner = sequence.group.request.owner
        line = self._lines.get(owner)
        if line is None:
            self._drop_past_lines()
            line = self._lines[owner] = OwnersLine(self._virtual_time)
        elif not line.items:
            line.tag = max(line.tag, self._virtual_time)
        return line

    def _drop_past_lines(self) -> None:
        """An empty line that the virtual time has passed says nothing that a missing one does not."""
        if len(self._lines) >= self._look_at:
            lines = self._lines.items()
            self._lines = {owner: line for owner, line in lines if line.items or line.tag > self._virtual_time}
            self._look_at = max(MAX_PAST_TAGS, 2 * len(self._lines))

    def _forget_if_idle(self) -> None:
        if not self._count:
            self._lines.clear()
