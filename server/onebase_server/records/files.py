"""Rows of files. Knows nothing of their bytes: `jobs/files.py` keeps those and calls here."""

from collections.abc import Callable, Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from onebase_server.records.database import Database
from onebase_server.records.pages import Order, Page, page
from onebase_server.records.tables import FileRow

KEEPING_LOCK = 0x6F6E6566


class FileRecords:
    """The files table. `owner=None` sees every row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, row: FileRow, check_room: Callable[[int], None] | None = None) -> None:
        """Keep a new file. `check_room` is told the bytes of the owner's files so far and may raise: then nothing is
        kept. No other such file is kept between what it is told and this one."""
        async with self._database.write() as session:
            if check_room is not None:
                if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer at a time anyway
                    await session.execute(select(func.pg_advisory_xact_lock(KEEPING_LOCK)))
                check_room(await bytes_of(session, row.owner))
            session.add(row)

    async def get(self, file_id: str, owner: str | None) -> FileRow | None:
        query = select(FileRow).where(FileRow.id == file_id)
        if owner is not None:
            query = query.where(FileRow.owner == owner)
        async with self._database.read() as session:
            return await session.scalar(query)

    async def list(
        self, owner: str | None, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> Page[FileRow]:
        query = select(FileRow)
        if owner is not None:
            query = query.where(FileRow.owner == owner)
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        async with self._database.read() as session:
            return await page(session, query, FileRow, after=after, limit=limit, order=order)

    async def delete(self, file_id: str) -> bool:
        """Forget the row. False when there was none."""
        async with self._database.write() as session:
            found = await session.scalars(delete(FileRow).where(FileRow.id == file_id).returning(FileRow.id))
            return found.first() is not None

    async def expired(self, now: int) -> Sequence[FileRow]:
        async with self._database.read() as session:
            return (await session.scalars(select(FileRow).where(FileRow.expires_at <= now))).all()

    async def ids(self) -> set[str]:
        async with self._database.read() as session:
            return set(await session.scalars(select(FileRow.id)))


async def bytes_of(session: AsyncSession, owner: str) -> int:
    """Of all the owner's files."""
    query = select(func.coalesce(func.sum(FileRow.bytes), 0)).where(FileRow.owner == owner)
    return int(await session.scalar(query) or 0)
