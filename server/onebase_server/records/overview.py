"""What the tables hold, in few numbers: for metrics and quotas. Knows no state's meaning."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from onebase_server.records.database import Database
from onebase_server.records.files import bytes_of
from onebase_server.records.tables import FileRow, JobRow

MOST = 100


@dataclass(frozen=True, slots=True)
class Overview:
    """`jobs`: how many in each state. `running`: at most `MOST` of those that run."""

    jobs: Mapping[str, int]
    running: Sequence[JobRow]
    file_bytes: int


async def read_overview(database: Database, running: str) -> Overview:
    """`running` is the state whose jobs are wanted in whole."""
    by_state = select(JobRow.state, func.count()).group_by(JobRow.state)
    async with database.read() as session:
        jobs = {state: count for state, count in (await session.execute(by_state)).all()}
        rows = (await session.scalars(select(JobRow).where(JobRow.state == running).limit(MOST))).all()
        total = await session.scalar(select(func.coalesce(func.sum(FileRow.bytes), 0)))
    return Overview(jobs, rows, int(total or 0))


async def file_bytes_of(database: Database, owner: str) -> int:
    """Bytes of the owner's files."""
    async with database.read() as session:
        return await bytes_of(session, owner)


async def adapters_of(database: Database, owner: str, kind: str) -> Sequence[str]:
    """Names of the adapters that the owner's jobs of one kind have trained, or are to."""
    query = select(JobRow.adapter).where(JobRow.owner == owner, JobRow.kind == kind).distinct()
    async with database.read() as session:
        return (await session.scalars(query)).all()


async def jobs_on(database: Database, adapter: str, states: Collection[str]) -> Sequence[JobRow]:
    """Jobs of either kind, in one of the states, that publish into the adapter. At most `MOST`."""
    query = select(JobRow).where(JobRow.adapter == adapter, JobRow.state.in_(states)).limit(MOST)
    async with database.read() as session:
        return (await session.scalars(query)).all()
