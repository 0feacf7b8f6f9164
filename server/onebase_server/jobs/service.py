"""What can be asked of jobs: make, find, cancel, pause, resume, follow. Starts no process: the supervisor does.

Everything is a row and a folder; a job exists once its row does. `owner=None` is an admin, who sees every job.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict

from onebase.errors import InvalidInput, OnebaseError
from onebase.home import Home
from onebase_server.jobs.files import FileService
from onebase_server.jobs.hyperparameters import AUTO
from onebase_server.jobs.job_limits import JobLimits
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.names import new_id, tuned_name
from onebase_server.jobs.order_files import find_file, give
from onebase_server.jobs.orders import FineTuningOrder, Once, RetrainOrder
from onebase_server.jobs.recipe import fixed_part
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.states import (
    CANCELLED,
    FINAL,
    FINE_TUNING,
    PAUSED,
    QUEUED,
    RETRAIN,
    RUNNING,
    STOPPABLE,
    VALIDATING,
)
from onebase_server.jobs.stored_chats import write_training_lines
from onebase_server.records.chats import ChatRecords
from onebase_server.records.jobs import Count, NewEvent
from onebase_server.records.pages import MetadataFilter, Page
from onebase_server.records.tables import CheckpointRow, EventRow, FileRow, JobRow

MAX_SEED = 2**31 - 1
LOOK_AGAIN_S = 1.0


class JobService:
    """Orders and questions. One per server process; other processes may use the same tables at the same time."""

    def __init__(
        self, home: Home, ledger: Ledger, files: FileService, chats: ChatRecords, limits: JobLimits | None = None
    ) -> None:
        self._home = home
        self._ledger = ledger
        self._records = ledger.records
        self._files = files
        self._chats = chats
        self._limits = limits or JobLimits()
        self._closing = False

    # Making

    async def made_before(self, owner: str, once: Once | None) -> JobRow | None:
        """The job that the owner's key has made already. Raises InvalidInput if it was another request's."""
        return None if once is None else await self._records.made_before(owner, once.key, once.digest)

    async def fine_tune(self, order: FineTuningOrder, owner: str | None, once: Once | None = None) -> JobRow:
        """Raises InvalidInput for a file that the owner does not have, Overloaded when too many jobs wait."""
        before = await self.made_before(order.owner, once)
        if before is not None:
            return before
        training = await find_file(self._files, order.training_file, owner, "training_file")
        validation = None
        if order.validation_file is not None:
            validation = await find_file(self._files, order.validation_file, owner, "validation_file")
        row = self._row(order, FINE_TUNING, new_id("ftjob-"), once)
        row.model = order.model
        row.suffix = order.suffix
        row.training_file, row.validation_file = order.training_file, order.validation_file
        row.meta = dict(order.metadata) if order.metadata else None
        row.method = dict(order.method) if order.method else None
        row.hyperparameters = {**AUTO, **order.hyperparameters}
        row.fine_tuned_model = tuned_name(order.base.id, order.suffix, row.id)
        folder = RunFolder(self._home.runs, row.id)
        return await self._keep(
            row, folder, {"training": training, "validation": validation}, _first_events(order, row)
        )

    async def retrain(self, order: RetrainOrder, owner: str | None, once: Once | None = None) -> JobRow:
        """Raises InvalidInput for a missing file or for no stored chats to learn from, Overloaded."""
        before = await self.made_before(order.owner, once)
        if before is not None:
            return before
        sources = [order.dataset is not None, order.training_file is not None, order.stored_chats]
        if sum(sources) != 1:
            raise InvalidInput("Give exactly one of 'dataset', 'training_file' and 'stored_chats'.", param="dataset")
        training = None
        if order.training_file is not None:
            training = await find_file(self._files, order.training_file, owner, "training_file")
        row = self._row(order, RETRAIN, new_id("run-"), once)
        row.model = order.base.id
        row.dataset = None if order.dataset is None else str(order.dataset)
        row.training_file = order.training_file
        row.hyperparameters = dict(order.hyperparameters)
        row.fine_tuned_model = tuned_name(order.base.id, order.adapter, row.id)
        folder = RunFolder(self._home.runs, row.id)
        if order.stored_chats:
            folder.create()
            try:
                await write_training_lines(folder.training, self._chats, order.adapter, owner)
            except InvalidInput:
                folder.remove()
                raise
        events = [NewEvent("created", f"Created retrain job: {row.id}")]
        return await self._keep(row, folder, {"training": training}, events, order.served_now)

    def _row(self, order: FineTuningOrder | RetrainOrder, kind: str, job_id: str, once: Once | None) -> JobRow:
        seed = secrets.randbelow(MAX_SEED + 1) if order.seed is None else order.seed
        recipe = fixed_part(order, job_id, seed)
        gate = order.gate if isinstance(order, RetrainOrder) else None
        return JobRow(
            id=job_id,
            owner=order.owner,
            kind=kind,
            state=VALIDATING,
            priority=order.priority,
            created_at=self._ledger.now(),
            idempotency_key=None if once is None else once.key,
            request_digest="" if once is None else once.digest,
            adapter=recipe["name"],
            seed=seed,
            preset=recipe.get("preset", "default"),
            start_from=order.start_from,
            recipe=recipe,
            gate=None if gate is None else asdict(gate),
            attempt=0,
            run_open=False,
            saved_step=0,
            losses=0,
            step=0,
            total_steps=0,
            result_files=[],
        )

    async def _keep(
        self,
        row: JobRow,
        folder: RunFolder,
        files: Mapping[str, FileRow | None],
        events: list[NewEvent],
        served_now: Callable[[], Mapping[int, float]] | None = None,
    ) -> JobRow:
        async def check_room(count: Count) -> None:
            await self._limits.check_room(row.owner, count)
            if served_now is not None:  # as the row is made: a run that moves the name from here on tells so behind it
                row.served_before = {str(version): share for version, share in served_now().items()}

        try:
            await check_room(self._records.count)  # before anything is written; others may be at it at the same time
            await asyncio.to_thread(folder.create)
            for name, file in files.items():
                if file is not None:
                    await asyncio.to_thread(give, self._files, file, folder, name)
            await asyncio.to_thread(folder.sync)
            kept, is_new = await self._ledger.add(row, events, check_room)
        except (OnebaseError, OSError):
            await asyncio.to_thread(folder.remove)
            raise
        # Any other error may have come after the commit: then the folder is needed, and else it is swept.
        if not is_new:
            await asyncio.to_thread(folder.remove)
        return kept

    # Asking

    async def get(self, job_id: str, owner: str | None) -> JobRow:
        """Raises NotFound."""
        return await self._ledger.get(job_id, owner)

    async def list(
        self, owner: str | None, *, kind: str | None, metadata: MetadataFilter | None, after: str | None, limit: int
    ) -> Page[JobRow]:
        """Newest first."""
        return await self._records.list(owner, kind=kind, metadata=metadata, after=after, limit=limit)

    async def events(self, job_id: str, owner: str | None, *, after: str | None, limit: int) -> Page[EventRow]:
        """Newest first. Raises NotFound."""
        await self._ledger.get(job_id, owner)
        return await self._records.events(job_id, after=after, limit=limit)

    async def checkpoints(
        self, job_id: str, owner: str | None, *, after: str | None, limit: int
    ) -> Page[CheckpointRow]:
        """Newest first. Raises NotFound."""
        await self._ledger.get(job_id, owner)
        return await self._records.checkpoints(job_id, after=after, limit=limit)

    async def follow(self, job_id: str) -> AsyncIterator[EventRow]:
        """Every event from the first on, as they happen, until the job has ended (or the server goes down)."""
        told = 0
        while not self._closing:
            job = await self._ledger.get(job_id)
            for event in await self._records.events_since(job_id, told):
                told = event.seq
                yield event
            if job.state in FINAL:
                return
            await self._ledger.news.wait(LOOK_AGAIN_S)

    def stop_following(self) -> None:
        """The server goes down: end what `follow` gives out, so that nobody waits for it."""
        self._closing = True
        self._ledger.news.tell()

    # Steering

    async def cancel(self, job_id: str, owner: str | None) -> JobRow:
        """The cancelled job; its process is gone, or has a few seconds left. Raises InvalidInput once it has ended."""
        await self._ledger.get(job_id, owner)
        # Also one that waits or is paused has a folder: an open run is what the supervisor sees to the end of.
        values = {"state": CANCELLED, "finished_at": self._ledger.now(), "eta_s": None, "run_open": True}
        event = NewEvent("cancelled", "The job has been cancelled")
        job = await self._ledger.change(job_id, values, when=STOPPABLE, events=[event])
        return job or self._refuse(await self._ledger.get(job_id), "cancelled")

    async def pause(self, job_id: str, owner: str | None) -> JobRow:
        """The paused job: what it did until its last checkpoint is kept. Raises InvalidInput if it does not run."""
        await self._ledger.get(job_id, owner)
        event = NewEvent(new_id("paused:"), "The job has been paused")
        job = await self._ledger.change(
            job_id, {"state": PAUSED, "eta_s": None}, when=(QUEUED, RUNNING), events=[event]
        )
        return job or self._refuse(await self._ledger.get(job_id), "paused")

    async def resume(self, job_id: str, owner: str | None) -> JobRow:
        """The job, queued again. Raises InvalidInput if it is not paused."""
        await self._ledger.get(job_id, owner)
        event = NewEvent(new_id("resumed:"), "The job has been resumed")
        job = await self._ledger.change(job_id, {"state": QUEUED}, when=(PAUSED,), events=[event])
        return job or self._refuse(await self._ledger.get(job_id), "resumed")

    @staticmethod
    def _refuse(job: JobRow, wish: str) -> JobRow:
        raise InvalidInput(
            f"The job {job.id} is {job.state} and can't be {wish}.", param="fine_tune_id", code="invalid_job_state"
        )


def _first_events(order: FineTuningOrder, row: JobRow) -> list[NewEvent]:
    validation = f" and validation file: {order.validation_file}" if order.validation_file else ""
    events = [
        NewEvent("created", f"Created fine-tuning job: {row.id}"),
        NewEvent("validating", f"Validating training file: {order.training_file}{validation}"),
    ]
    if order.has_integrations:
        events.append(NewEvent("integrations", "Integrations are not offered here and were ignored", level="warn"))
    return events
