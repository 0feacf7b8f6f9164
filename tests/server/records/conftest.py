"""Every test here runs on SQLite and on a real PostgreSQL, which starts once and is emptied between tests."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from onebase_server.records.database import Database
from onebase_server.records.tables import Base
from postgres_server import postgres


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'onebase.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def database(url: str, anyio_backend: str) -> AsyncIterator[Database]:
    database = Database.at(url)
    await database.migrate()
    yield database
    if url.startswith("postgresql"):
        async with database.write() as session:
            await session.execute(text(f"TRUNCATE {', '.join(Base.metadata.tables)} CASCADE"))
    await database.close()
