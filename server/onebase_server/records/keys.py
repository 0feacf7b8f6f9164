"""Rows of API keys. Knows no secret: callers hand in hashes, and no key's meaning is decided here."""

import asyncio
import logging
from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from onebase_server.records.database import Database
from onebase_server.records.tables import JobRow, KeyRow

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 100_000


class KeyRecords:
    """The keys table, and who made which adapter."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._notes: set[asyncio.Task[None]] = set()
        self._makers: dict[str, tuple[str, str] | None] = {}

    async def add(self, row: KeyRow) -> None:
        async with self._database.write() as session:
            session.add(row)

    async def by_hash(self, digest: str) -> KeyRow | None:
        async with self._database.read() as session:
            return await session.scalar(select(KeyRow).where(KeyRow.hash == digest))

    async def by_id(self, key_id: str) -> KeyRow | None:
        async with self._database.read() as session:
            return await session.scalar(select(KeyRow).where(KeyRow.id == key_id))

    async def list(self) -> Sequence[KeyRow]:
        """All of them, revoked and expired ones too, oldest first."""
        async with self._database.read() as session:
            return (await session.scalars(select(KeyRow).order_by(KeyRow.seq))).all()

    async def any(self) -> bool:
        """Whether a key was ever made here, whatever became of it."""
        async with self._database.read() as session:
            return await session.scalar(select(KeyRow.seq).limit(1)) is not None

    async def revoke(self, key_id: str, now: int) -> KeyRow | None:
        """The row, revoked now or earlier. None if there is no such key."""
        async with self._database.write() as session:
            row = await session.scalar(select(KeyRow).where(KeyRow.id == key_id).with_for_update())
            if row is not None and row.revoked_at is None:
                row.revoked_at = now
        return row

    def note_use(self, key_id: str, now: int) -> None:
        """Write the last use down without making anybody wait for it; one that can't be written is let go."""
        task = asyncio.ensure_future(self._write_use(key_id, now))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _write_use(self, key_id: str, now: int) -> None:
        try:
            async with self._database.write() as session:
                await session.execute(update(KeyRow).where(KeyRow.id == key_id).values(last_used_at=now))
        except (SQLAlchemyError, OSError) as error:
            logger.warning("the last use of %s could not be noted: %s", key_id, type(error).__name__)

    async def close(self) -> None:
        """Wait for what is still being written."""
        await asyncio.gather(*self._notes)

    async def maker_of(self, adapter: str, *, anew: bool = False) -> tuple[str, str] | None:
        """(kind, owner) of the job that first trained an adapter that is in the store; None if no job did.

        Remembered for good: a job's row is there before its adapter is, and fine-tuning never takes a name again. Only
        that no job did may change, when an adapter that was imported is trained on: `anew` asks the table again.
        """
        if adapter not in self._makers or (anew and self._makers[adapter] is None):
            query = select(JobRow.kind, JobRow.owner).where(JobRow.adapter == adapter).order_by(JobRow.seq).limit(1)
            async with self._database.read() as session:
                found = (await session.execute(query)).first()
            if len(self._makers) >= MAX_REMEMBERED:
                self._makers.clear()
            self._makers[adapter] = None if found is None else (found[0], found[1])
        return self._makers[adapter]
