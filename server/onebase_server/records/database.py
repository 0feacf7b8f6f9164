"""One database: its engine, its transactions, its migrations. Knows no table's meaning.

SQLite runs in WAL with full syncs, so that a committed row survives a power cut; writers take the lock at BEGIN, so
that no transaction fails half-way for having read first. PostgreSQL goes through psycopg.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from onebase.errors import InvalidInput

BUSY_MS = 30_000
CACHE_KB = 256
"""Of pages, for each connection. SQLite's own 2 MB would fill bit by bit as the tables grow, and the kernel keeps the
file in memory anyway."""
MIGRATION_LOCK = 0x6F6E6562
_one_at_a_time = threading.Lock()  # Alembic's context is global to the process
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """`Database.at(url)`; then `await migrate()` once, and `read()` / `write()` blocks. `await close()` at the end."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._sqlite = url.get_backend_name() == "sqlite"
        driver = "sqlite+aiosqlite" if self._sqlite else "postgresql+psycopg"
        # A connection that died with a restarted PostgreSQL is replaced before it is used.
        # An error must not tell what was to be written: it ends in the log, and chats' text is a parameter.
        self._engine = create_async_engine(
            url.set(drivername=driver), pool_pre_ping=not self._sqlite, hide_parameters=True
        )
        if self._sqlite:
            _tune_sqlite(self._engine.sync_engine)
        self._session = async_sessionmaker(self._engine, expire_on_commit=False)
        self._writer: asyncio.Lock | None = asyncio.Lock() if self._sqlite else None

    @classmethod
    def at(cls, url: str) -> "Database":
        """`sqlite:///path` or `postgresql://user:password@host/name`. Raises InvalidInput for anything else."""
        return cls(parse_url(url))

    @classmethod
    def file(cls, path: Path) -> "Database":
        """SQLite in one file, made when missing."""
        return cls(URL.create("sqlite", database=str(path)))

    async def migrate(self) -> None:
        """Bring the tables up to this code's version, in a thread of its own. Safe to call at every start.

        Raises InvalidInput for a database that a newer onebase has written.
        """
        await asyncio.to_thread(self._migrate)

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        url = self._url.set(drivername="sqlite" if self._sqlite else "postgresql+psycopg")
        engine = create_engine(url, hide_parameters=True)
        if self._sqlite:
            _close_to_others(self._url)
            _tune_sqlite(engine)
        try:
            with _one_at_a_time, engine.connect().execution_options(write=True) as connection:
                if not self._sqlite:  # two servers may start at once; SQLite's BEGIN IMMEDIATE is that lock already
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
        except CommandError as error:  # it names a revision that this code does not have
            raise InvalidInput(
                f"The database was written by a newer onebase ({error}): use that one, or a backup from before.",
                param="database",
            ) from error
        finally:
            engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A consistent view; rows stay readable after the block."""
        async with self._session() as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """One transaction: committed at the end of the block, rolled back on an exception."""
        # Our own writers queue here and not in SQLite, whose waiting is a poll.
        async with self._writer or nullcontext(), self._session() as session, session.begin():
            await session.connection(execution_options={"write": True})
            yield session

    async def close(self) -> None:
        await self._engine.dispose()


def parse_url(url: str) -> URL:
    """Raises InvalidInput for what is no URL of a database that we can use."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidInput("The database URL does not parse.", param="database") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise InvalidInput(
            f"Database '{parsed.get_backend_name()}' is not supported: use sqlite:///path or postgresql://...",
            param="database",
        )
    return parsed


def _close_to_others(url: URL) -> None:
    """A new SQLite file is its owner's alone, and with it the files that SQLite puts beside it: they take its mode."""
    if url.database and url.database != ":memory:":
        os.close(os.open(url.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _tune_sqlite(engine: Engine) -> None:
    """Pragmas for each connection, and our own BEGIN: the driver's starts too late and never immediate."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        try:
            for pragma in (
                "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_MS}",
                f"cache_size=-{CACHE_KB}",
            ):  # fmt: skip
                cursor.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()  # nobody else would: it is not the pool's yet, and each holds a thread
            raise
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Any) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
