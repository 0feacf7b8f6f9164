"""Rows of schedules. Knows no cron line and no request: `jobs/schedules.py` says when, the API says what."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, update

from onebase_server.records.database import Database
from onebase_server.records.tables import ScheduleRow


class ScheduleRecords:
    """The schedules table. Only admins see it, so it has no filter by owner."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, row: ScheduleRow) -> None:
        async with self._database.write() as session:
            session.add(row)

    async def list(self) -> Sequence[ScheduleRow]:
        """The oldest first."""
        async with self._database.read() as session:
            return (await session.scalars(select(ScheduleRow).order_by(ScheduleRow.seq))).all()

    async def due(self, now: int) -> Sequence[ScheduleRow]:
        """Those whose time has come, the one that waits longest first."""
        query = select(ScheduleRow).where(ScheduleRow.next_at <= now).order_by(ScheduleRow.next_at, ScheduleRow.seq)
        async with self._database.read() as session:
            return (await session.scalars(query)).all()

    async def advance(self, row: ScheduleRow, **values: Any) -> None:
        """Set columns, unless somebody has moved or removed it meanwhile."""
        same = (ScheduleRow.id == row.id, ScheduleRow.next_at == row.next_at)
        async with self._database.write() as session:
            await session.execute(update(ScheduleRow).where(*same).values(**values))

    async def remove(self, schedule_id: str) -> bool:
        """False when there was none."""
        gone = delete(ScheduleRow).where(ScheduleRow.id == schedule_id).returning(ScheduleRow.id)
        async with self._database.write() as session:
            return (await session.scalars(gone)).first() is not None
