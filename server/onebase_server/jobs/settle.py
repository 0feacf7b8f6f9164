"""How a job ends: published, failed, cancelled, or back in the queue. Each way is safe to walk again after a crash.

The adapter store is the truth. A job's own alias in it says whether its training ended well, whatever became of the
process that wrote it; the state in the table follows. Knows nothing of processes.
"""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from onebase.errors import Conflict, InvalidInput, ModelNotFound
from onebase.store import AdapterStore, Entry, Version
from onebase_server.jobs.files import RESULTS, FileService
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.progress import EventsTail, StepMetrics
from onebase_server.jobs.results import results_csv
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.states import FAILED, FINE_TUNING, PUBLISHING, QUEUED, RUNNING, SUCCEEDED, UNFINISHED
from onebase_server.records.jobs import NewEvent
from onebase_server.records.tables import JobRow

logger = logging.getLogger(__name__)

JobError = Mapping[str, Any]

LESS_MEMORY = (
    "If the machine's memory ran out: lower hyperparameters.tokens_at_once or max_tokens, or set "
    "hyperparameters.gradient_checkpointing (of a retraining), shorten the longest examples, or add memory"
)


def job_error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's `error` of a failed job."""
    return {"code": code, "message": message, "param": param}


class Settler:
    """Writes the ends of jobs into the store, the files and the table."""

    def __init__(self, ledger: Ledger, files: FileService, store: AdapterStore) -> None:
        self._ledger = ledger
        self._files = files
        self._store = store

    def published(self, job: JobRow) -> Version | None:
        """The version that the job's training has put into the store, if it got so far."""
        try:
            return self._store.resolve(job.fine_tuned_model or "")
        except ModelNotFound:
            return None

    async def publish(self, job: JobRow, folder: RunFolder, version: Version) -> bool:
        """From here on it can't be cancelled any more. False if it was, just before."""
        result = None
        if job.kind == FINE_TUNING:
            result = await self._keep_results(job, folder)
        values = {
            "state": PUBLISHING,
            "version": version.id,
            "result_files": [] if result is None else [result],
            "trained_tokens": _trained_tokens(job, version),
        }
        return await self._ledger.change(job.id, values, when=(RUNNING,)) is not None

    async def succeed(self, job: JobRow, folder: RunFolder) -> None:
        """Serve the version under the adapter's name, then say so.

        The job fails if its version was removed meanwhile, or the name was moved by hand: a hand goes before a job.
        """
        version = self.published(job)
        entry = self._store.get(job.adapter)
        if version is None or entry is None:
            return await self.fail_removed(job, folder)
        if await self._was_moved_by_hand(job, version, entry):
            return await self._fail_moved(job, folder, version, entry)
        move = partial(self._store.set_current, version.name, version.version, expected=entry.weights)
        try:
            await asyncio.to_thread(move)
        except (ModelNotFound, InvalidInput, Conflict):  # somebody was faster: look again
            return await self.succeed(job, folder)
        await asyncio.to_thread(folder.remove_checkpoints)
        model = job.fine_tuned_model if job.kind == FINE_TUNING else version.id
        await self._ledger.change(
            job.id,
            {"state": SUCCEEDED, "finished_at": self._ledger.now(), "run_open": False, "eta_s": None, "message": None},
            when=(PUBLISHING,),
            events=[
                NewEvent("model", f"New fine-tuned model created: {model}"),
                NewEvent("succeeded", "The job has successfully completed"),
            ],
        )
        await asyncio.to_thread(folder.remove_data)
        logger.info("job %s succeeded: %s", job.id, version.id)
        return None

    async def fail(self, job: JobRow, folder: RunFolder, error: JobError, **values: Any) -> None:
        """What was served before stays served."""
        await asyncio.to_thread(folder.remove_checkpoints)
        await self._ledger.change(
            job.id,
            {
                "state": FAILED, "finished_at": self._ledger.now(), "run_open": False, "eta_s": None,
                "error": dict(error), **values,
            },
            when=UNFINISHED,
            events=[NewEvent("failed", f"The job failed: {error['message']}", level="error")],
        )  # fmt: skip
        await asyncio.to_thread(folder.remove_data)
        logger.warning("job %s failed: %s", job.id, error["message"])

    async def _was_moved_by_hand(self, job: JobRow, version: Version, entry: Entry) -> bool:
        """Since the run was ordered, by anybody but the adapter's other runs."""
        if job.served_before is None or entry.weights == {version.version: 1.0}:
            return False
        expected = {int(number): share for number, share in job.served_before.items()}
        other = await self._ledger.records.last_version(job.adapter, "succeeded", after=(job.id, "created"))
        if other is not None:
            expected = {int(other.partition("@")[2]): 1.0}
        return entry.weights != expected

    async def _fail_moved(self, job: JobRow, folder: RunFolder, version: Version, entry: Entry) -> None:
        now = " and ".join(f"{entry.name}@{number}" for number in entry.weights) or "nothing"
        message = (
            f"{version.id} was not published: {entry.name} was moved by hand since the run was ordered ({now}). "
            f'To serve it all the same: POST /admin/adapters/{entry.name}/publish with {{"version": {version.version}}}'
        )
        await self.fail(job, folder, job_error("name_moved", message))

    async def fail_removed(self, job: JobRow, folder: RunFolder) -> None:
        """What it trained is no more in the store: somebody has deleted the version, or the whole adapter."""
        message = f"{job.version or job.adapter} was removed before it could be published: train it again"
        await self.fail(job, folder, job_error("version_removed", message), version=None)

    async def discard(self, job: JobRow, folder: RunFolder) -> None:
        """A cancelled job's run is over: what it published at the last moment is taken back."""
        await self.take_back(job)
        await asyncio.to_thread(folder.remove_checkpoints)
        await self._ledger.change(job.id, {"run_open": False, "version": None}, when=(job.state,))
        await asyncio.to_thread(folder.remove_data)

    async def take_back(self, job: JobRow) -> None:
        """The version that the job's training has put into the store, and its name."""
        version = self.published(job)
        if version is None:
            return
        try:
            await asyncio.to_thread(self._store.remove, version.id)
        except (ModelNotFound, Conflict):  # gone already, or an admin serves it on purpose
            logger.info("version %s of the job %s stays", version.id, job.id)

    async def requeue(self, job: JobRow, reason: str, *, saved_step: int, losses: int) -> None:
        """Its process was lost: it goes on from its last checkpoint when its turn comes."""
        event = NewEvent(f"requeued:{job.attempt}", f"{reason}; the job goes back to the queue", level="warn")
        values = {"state": QUEUED, "run_open": False, "eta_s": None, "saved_step": saved_step, "losses": losses}
        await self._ledger.change(job.id, values, when=(RUNNING,), events=[event])
        logger.warning("job %s: %s; queued again", job.id, reason)

    async def let_go(self, job: JobRow) -> None:
        """A paused (or meanwhile resumed) job's run is over; its checkpoints wait for the next one."""
        await self._ledger.change(job.id, {"run_open": False}, when=(job.state,))

    async def _keep_results(self, job: JobRow, folder: RunFolder) -> str:
        told = await asyncio.to_thread(EventsTail(folder.events).new)
        data = results_csv(each for each in told if isinstance(each, StepMetrics))
        file_id = f"file-{hashlib.sha256(f'results of {job.id}'.encode()).hexdigest()[:24]}"  # the same after a crash
        return await self._files.add_once(file_id, data, filename="step_metrics.csv", purpose=RESULTS, owner=job.owner)


def _trained_tokens(job: JobRow, version: Version) -> int | None:
    """The trainer's own count, from its last status or from the version's manifest."""
    found = version.metrics.get("trained_tokens")
    return int(found) if isinstance(found, int | float) else job.trained_tokens
