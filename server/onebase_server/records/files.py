"""Rows of files. Knows nothing of their bytes: `jobs/files.py` keeps those and calls here."""

from collections.abc import Sequence

from sqlalchemy import delete, select

from onebase_server.records.database import Database
from onebase_server.records.pages import Order, Page, page
from onebase_server.records.tables import FileRow


class FileRecords:
    """The files table. `owner=None` sees every row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, row: FileRow) -> None:
        async with self._database.write() as session:
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
