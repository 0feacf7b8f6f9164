"""The first part of a job: its data are checked, or copied, in a thread. Neither a cancellation nor the server's end
waits for it: a large dataset takes minutes.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from onebase_server.jobs.hyperparameters import decided
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.run_data import check_files
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.settle import Settler
from onebase_server.jobs.states import FINE_TUNING, QUEUED, VALIDATING
from onebase_server.jobs.watch import ServerStopsError
from onebase_server.records.jobs import NewEvent
from onebase_server.records.tables import JobRow


class _LeftOffError(Exception):
    """Nobody waits for the check any more."""


class _Check:
    """What the thread says of its work, and whether it is to go on."""

    def __init__(self) -> None:
        self.said: str | None = None
        self._over = threading.Event()

    def go_on(self, said: str | None) -> None:
        """In the thread. Raises _LeftOffError."""
        if self._over.is_set():
            raise _LeftOffError
        self.said = said or self.said

    def leave_off(self) -> None:
        self._over.set()


async def validate(
    job: JobRow, folder: RunFolder, ledger: Ledger, settler: Settler, look_s: float, stopping: Callable[[], bool]
) -> None:
    """Until the job waits for its turn, has failed, or is cancelled. Raises ServerStopsError when the server stops
    first: the next one begins again."""
    check = _Check()
    work = asyncio.create_task(asyncio.to_thread(check_files, job, folder, check.go_on))
    told = None
    try:
        while not (await asyncio.wait([work], timeout=look_s))[0]:
            if stopping():
                raise ServerStopsError
            if (await ledger.get(job.id)).state != VALIDATING:
                return None
            if check.said != told:
                told = check.said
                await ledger.change(job.id, {"message": told}, when=(VALIDATING,))
    finally:
        check.leave_off()
        await asyncio.gather(work, return_exceptions=True)  # else it would write where others tidy up
    checked = work.result()
    if not isinstance(checked, int):
        return await settler.fail(job, folder, checked)
    values: dict[str, Any] = {"state": QUEUED, "message": None}
    if job.kind == FINE_TUNING:
        values["hyperparameters"] = decided(job.hyperparameters, checked)
    event = NewEvent("validated", "Files validated, moving job to queued state")
    await ledger.change(job.id, values, when=(VALIDATING,), events=[event])
    return None
