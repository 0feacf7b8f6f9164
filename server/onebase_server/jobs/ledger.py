"""The job table as the jobs package writes it: ids and times are made here, and whoever waits for news is woken.

Every change of a job, by a handler or by the supervisor, goes through `change`, with the states it may start from.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from onebase.errors import NotFound
from onebase_server.jobs.names import new_id
from onebase_server.records.jobs import Count, JobRecords, NewCheckpoint, NewEvent
from onebase_server.records.tables import JobRow


class News:
    """Wakes everyone who waits, at every change. Those who wait look again by themselves: nothing is carried."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, at_most_s: float) -> None:
        """Until the next change, or so many seconds: another process may have changed the table too."""
        try:
            await asyncio.wait_for(self._event.wait(), at_most_s)
        except TimeoutError:
            return


class Ledger:
    """Wraps the job records. `now` gives Unix seconds."""

    def __init__(self, records: JobRecords, *, now: Callable[[], float] = time.time) -> None:
        self.records = records
        self.news = News()
        self._now = now

    def now(self) -> int:
        return int(self._now())

    async def add(
        self, row: JobRow, events: Sequence[NewEvent], check_room: Callable[[Count], Awaitable[None]]
    ) -> tuple[JobRow, bool]:
        """A new job, or the one that was made with the same idempotency key, and whether it is new. `check_room` may
        raise: then it is not made."""
        ids = [new_id("ftevent-") for _ in events]
        row, is_new = await self.records.add(row, events, event_ids=ids, check_room=check_room)
        self.news.tell()
        return row, is_new

    async def get(self, job_id: str, owner: str | None = None) -> JobRow:
        """Raises NotFound, in OpenAI's words."""
        row = await self.records.get(job_id, owner)
        if row is None:
            raise NotFound(f"Could not find fine tune: {job_id}", param="fine_tune_id", code="fine_tune_not_found")
        return row

    async def change(
        self,
        job_id: str,
        values: Mapping[str, Any] | None = None,
        *,
        when: Collection[str],
        events: Sequence[NewEvent] = (),
        checkpoints: Sequence[NewCheckpoint] = (),
        forget_steps: Collection[int] = (),
    ) -> JobRow | None:
        """Set columns and tell events, if the state is one of `when`; else None, and nothing is changed."""
        row = await self.records.change(
            job_id,
            values or {},
            when=when,
            now=self.now(),
            events=[(new_id("ftevent-"), event) for event in events],
            checkpoints=[(new_id("ftckpt_"), checkpoint) for checkpoint in checkpoints],
            forget_steps=forget_steps,
        )
        if row is not None:
            self.news.tell()
        return row
