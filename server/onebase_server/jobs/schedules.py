"""Schedules: retrainings that order themselves. The supervisor calls `tick` each round, so only one server does.

A time that was missed while no server ran is made up for once, however many were missed. A time that comes while a
job of the adapter is still going is passed over. What went wrong stands in the schedule until its next time.
"""

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from onebase.errors import NotReady, OnebaseError, Overloaded
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.names import new_id
from onebase_server.jobs.orders import Once, RetrainOrder
from onebase_server.jobs.schedule_times import Timing
from onebase_server.jobs.service import JobService
from onebase_server.jobs.states import UNFINISHED
from onebase_server.records.schedules import ScheduleRecords
from onebase_server.records.tables import ScheduleRow

logger = logging.getLogger(__name__)

OrderMaker = Callable[[ScheduleRow], RetrainOrder]
"""What a kept request means at this moment. Raises OnebaseError, NotReady among them."""


class Scheduler:
    """`order_of` is given by the app, which alone knows the request's form; until then no time comes."""

    def __init__(self, records: ScheduleRecords, ledger: Ledger, jobs: JobService) -> None:
        self.records = records
        self.order_of: OrderMaker | None = None
        self._ledger = ledger
        self._jobs = jobs
        self._looked_at = 0

    async def add(self, adapter: str, timing: Timing, order: dict[str, Any], owner: str) -> ScheduleRow:
        """Raises InvalidInput for a timing that can't be read."""
        row = schedule_row(adapter, timing, order, owner, self._ledger.now())
        await self.records.add(row)
        return row

    async def tick(self) -> None:
        """Order what is due. May be called at any rate: it looks once a second."""
        now = self._ledger.now()
        if self.order_of is None or now == self._looked_at:
            return
        self._looked_at = now
        for row in await self.records.due(now):
            await self._come(row, now, self.order_of)

    async def _come(self, row: ScheduleRow, now: int, order_of: OrderMaker) -> None:
        values: dict[str, Any] = {}
        try:
            busy = await self._ledger.records.of_adapter(row.adapter, UNFINISHED)
            if busy is not None:
                values["note"] = f"passed over: {busy} was still going"
            else:
                order = order_of(row)
                # Known again after a crash between the two writes: one time makes one job.
                once = Once.of(f"{row.id}:{row.next_at}", "schedule", row.request)
                job = await self._jobs.retrain(order, None, once)
                values = {"note": None, "last_at": now, "last_run": job.id}
                logger.info("schedule %s ordered %s for '%s'", row.id, job.id, row.adapter)
        except (NotReady, Overloaded):  # the base is still loading, or the queue is full: it stays due
            return
        except OnebaseError as error:
            values["note"] = f"could not be ordered: {error.message}"
            logger.warning("schedule %s of '%s' could not be ordered: %s", row.id, row.adapter, error.message)
        except SQLAlchemyError:  # nothing could be written down: it stays due
            raise
        except Exception:  # a full disk, or a fault of ours: neither other schedules nor the supervisor are held up
            values["note"] = "could not be ordered; the server's log says why"
            logger.exception("schedule %s of '%s' could not be ordered", row.id, row.adapter)
        await self.records.advance(row, next_at=timing_of(row).next_after(row.next_at, now), **values)


def schedule_row(adapter: str, timing: Timing, order: dict[str, Any], owner: str, now: int) -> ScheduleRow:
    return ScheduleRow(
        id=new_id("sched-"),
        owner=owner,
        adapter=adapter,
        cron=timing.cron,
        every=timing.every,
        timezone=timing.timezone,
        request=order,
        created_at=now,
        next_at=timing.first_after(now),
    )


def timing_of(row: ScheduleRow) -> Timing:
    return Timing(row.cron, row.every, row.timezone)
