"""Rows of jobs, their events and their checkpoints. Knows no state's meaning and no process.

The one rule kept here: a change names the states that it may start from, and its events are committed with it. So
two writers (a handler that cancels, the supervisor that sees the end) can't both win, and no event tells of a change
that did not happen.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from onebase.errors import InvalidInput
from onebase_server.records.database import Database
from onebase_server.records.pages import MetadataFilter, Page, metadata_is, page
from onebase_server.records.tables import CheckpointRow, EventRow, JobRow

LOOKED_UP = 500  # keys in one query: databases bound the number of parameters
MAKING_LOCK = 0x6F6E656A
Count = Callable[[Collection[str], str | None], Awaitable[int]]
"""How many jobs are in these states, of an owner or (None) of all."""


@dataclass(frozen=True)
class NewEvent:
    """An event to tell once: `key` is unique within its job."""

    key: str
    message: str
    level: str = "info"
    type: str = "message"
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class NewCheckpoint:
    """A servable state after `step`; `model` is the name that clients call, `version` its place in the store."""

    step: int
    model: str
    version: str
    metrics: Mapping[str, float]


class JobRecords:
    """The jobs, events and checkpoints tables. `owner=None` sees every row; `now` and ids come from the caller."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self,
        row: JobRow,
        events: Sequence[NewEvent],
        *,
        event_ids: Sequence[str],
        check_room: Callable[[Count], Awaitable[None]] | None = None,
    ) -> tuple[JobRow, bool]:
        """Keep a new job and its first events. With an idempotency key that was used before: that job, and False.

        `check_room` may raise: then nothing is kept. No other job is made between what it counts and this one.
        Raises InvalidInput when the key was used for another request.
        """
        async with self._database.write() as session:
            if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer at a time anyway
                await session.execute(select(func.pg_advisory_xact_lock(MAKING_LOCK)))
            if row.idempotency_key is not None:
                before = await _made_before(session, row.owner, row.idempotency_key, row.request_digest)
                if before is not None:
                    return before, False
            if check_room is not None:
                await check_room(partial(_count, session))
            session.add(row)
            await session.flush()
            for event, event_id in zip(events, event_ids, strict=True):
                session.add(_event_row(row, event, event_id, row.created_at))
        return row, True

    async def made_before(self, owner: str, key: str, digest: str) -> JobRow | None:
        """The job that the owner made with this idempotency key. Raises InvalidInput if its request was another."""
        async with self._database.read() as session:
            return await _made_before(session, owner, key, digest)

    async def get(self, job_id: str, owner: str | None = None) -> JobRow | None:
        query = select(JobRow).where(JobRow.id == job_id)
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        async with self._database.read() as session:
            return await session.scalar(query)

    async def list(
        self, owner: str | None, *, kind: str | None, metadata: MetadataFilter | None, after: str | None, limit: int
    ) -> Page[JobRow]:
        query = select(JobRow)
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        if kind is not None:
            query = query.where(JobRow.kind == kind)
        async with self._database.read() as session:
            if metadata is not None:
                query = query.where(*metadata_is(session, JobRow.meta, metadata))
            return await page(session, query, JobRow, after=after, limit=limit, order="desc")

    async def change(
        self,
        job_id: str,
        values: Mapping[str, Any],
        *,
        when: Collection[str],
        now: int,
        events: Sequence[tuple[str, NewEvent]] = (),
        checkpoints: Sequence[tuple[str, NewCheckpoint]] = (),
        forget_steps: Collection[int] = (),
    ) -> JobRow | None:
        """Set columns and tell events, if the job's state is one of `when`; None (and nothing changed) if not.

        `events` and `checkpoints` come with their ids; those whose key or step is there already are left out.
        `forget_steps` drops the checkpoints of those steps.
        """
        async with self._database.write() as session:
            job = await session.scalar(select(JobRow).where(JobRow.id == job_id).with_for_update())
            if job is None or job.state not in when:
                return None
            for name, value in values.items():
                setattr(job, name, value)
            await _tell(session, job, events, now)
            await _keep(session, job, checkpoints, now)
            if forget_steps:
                gone = delete(CheckpointRow).where(CheckpointRow.job_id == job.id, CheckpointRow.step.in_(forget_steps))
                await session.execute(gone)
        return job

    async def in_states(self, states: Collection[str]) -> Sequence[JobRow]:
        """The jobs in these states, the one to run first at the front."""
        query = select(JobRow).where(JobRow.state.in_(states)).order_by(JobRow.priority.desc(), JobRow.seq)
        async with self._database.read() as session:
            return (await session.scalars(query)).all()

    async def with_open_run(self) -> Sequence[JobRow]:
        """The jobs that were begun and whose processes and outcome are not settled yet, whatever their state."""
        async with self._database.read() as session:
            return (await session.scalars(select(JobRow).where(JobRow.run_open).order_by(JobRow.seq))).all()

    async def of_adapter(self, adapter: str, states: Collection[str]) -> str | None:
        """The id of a job of the adapter that is in one of these states, or None."""
        query = select(JobRow.id).where(JobRow.adapter == adapter, JobRow.state.in_(states)).order_by(JobRow.seq)
        async with self._database.read() as session:
            return (await session.scalars(query.limit(1))).first()

    async def last_version(self, adapter: str, event: str, *, after: tuple[str, str]) -> str | None:
        """The version of the adapter's job that told of `event` (a key) last, if it did so behind the event `after`
        (job id, key). By the events' own order: a second has room for several."""
        border = select(EventRow.seq).where(EventRow.job_id == after[0], EventRow.key == after[1]).scalar_subquery()
        query = (
            select(JobRow.version)
            .join(EventRow, EventRow.job_id == JobRow.id)
            .where(JobRow.adapter == adapter, EventRow.key == event, EventRow.seq > border)
            .order_by(EventRow.seq.desc())
        )
        async with self._database.read() as session:
            return (await session.scalars(query.limit(1))).first()

    async def count(self, states: Collection[str], owner: str | None = None) -> int:
        async with self._database.read() as session:
            return await _count(session, states, owner)

    async def ids(self) -> set[str]:
        async with self._database.read() as session:
            return set(await session.scalars(select(JobRow.id)))

    async def events(self, job_id: str, *, after: str | None, limit: int) -> Page[EventRow]:
        """Newest first."""
        query = select(EventRow).where(EventRow.job_id == job_id)
        async with self._database.read() as session:
            return await page(session, query, EventRow, after=after, limit=limit, order="desc")

    async def events_since(self, job_id: str, seq: int) -> Sequence[EventRow]:
        """Oldest first: what was told after the event numbered `seq`."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > seq).order_by(EventRow.seq)
        async with self._database.read() as session:
            return (await session.scalars(query)).all()

    async def checkpoints(self, job_id: str, *, after: str | None, limit: int) -> Page[CheckpointRow]:
        """Newest first."""
        query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        async with self._database.read() as session:
            return await page(session, query, CheckpointRow, after=after, limit=limit, order="desc")


async def _count(session: AsyncSession, states: Collection[str], owner: str | None) -> int:
    query = select(func.count()).where(JobRow.state.in_(states))
    if owner is not None:
        query = query.where(JobRow.owner == owner)
    return await session.scalar(query) or 0


async def _made_before(session: AsyncSession, owner: str, key: str, digest: str) -> JobRow | None:
    before = await session.scalar(select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == key))
    if before is not None and before.request_digest != digest:
        raise InvalidInput(
            f"Idempotency-Key '{key}' was used for another request (job {before.id}). Use a new key.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return before


async def _tell(session: AsyncSession, job: JobRow, events: Sequence[tuple[str, NewEvent]], now: int) -> None:
    if not events:
        return
    keys = [event.key for _, event in events]
    told: set[str] = set()
    for start in range(0, len(keys), LOOKED_UP):
        some = keys[start : start + LOOKED_UP]
        told |= set(
            await session.scalars(select(EventRow.key).where(EventRow.job_id == job.id, EventRow.key.in_(some)))
        )
    for event_id, event in events:
        if event.key not in told:
            told.add(event.key)
            session.add(_event_row(job, event, event_id, now))


async def _keep(session: AsyncSession, job: JobRow, checkpoints: Sequence[tuple[str, NewCheckpoint]], now: int) -> None:
    if not checkpoints:
        return
    kept = set(await session.scalars(select(CheckpointRow.step).where(CheckpointRow.job_id == job.id)))
    for checkpoint_id, new in checkpoints:
        if new.step in kept:
            continue
        kept.add(new.step)
        session.add(
            CheckpointRow(
                id=checkpoint_id,
                owner=job.owner,
                job_id=job.id,
                created_at=now,
                step=new.step,
                model=new.model,
                version=new.version,
                metrics=dict(new.metrics),
            )
        )


def _event_row(job: JobRow, event: NewEvent, event_id: str, now: int) -> EventRow:
    return EventRow(
        id=event_id,
        owner=job.owner,
        job_id=job.id,
        key=event.key,
        created_at=now,
        level=event.level,
        type=event.type,
        message=event.message,
        data=None if event.data is None else dict(event.data),
    )
