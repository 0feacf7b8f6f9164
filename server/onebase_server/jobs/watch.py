"""A run's process, watched until it has ended: its news are told, and it is ended if its job is to stop or it is stuck.

Ending comes before telling: neither a slow disk nor a report that fails may hold a cancellation up. Knows nothing of
what comes after the process.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.process import RunProcess, Silence
from onebase_server.jobs.progress import Reporter
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.states import CANCELLED, RUNNING

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Seconds, and how often a process may be lost: one that was killed or is gone is started again, one that ended
    by itself with an error is not."""

    poll_s: float = 0.25
    cancel_grace_s: float = 3.0
    """What a cancelled process gets to end cleanly before it is killed."""
    pause_grace_s: float = 60.0
    """What a paused one gets for its step and its checkpoint."""
    stall_s: float = 900.0
    """Silence after which a process counts as stuck."""
    report_again_s: float = 5.0
    """After a report that failed: a full disk is not to be written to four times a second."""
    max_losses: int = 5
    """In a row, without a new checkpoint between them: such a job would never end."""


class ServerStopsError(Exception):
    """The server stops; the run goes on without it."""


class Watch:
    """Over one process; None is one that has ended. `stopping`: whether the server is going down. `stalled` afterwards:
    it was killed for its silence."""

    def __init__(
        self,
        job_id: str,
        folder: RunFolder,
        process: RunProcess | None,
        ledger: Ledger,
        times: RunTimes,
        stopping: Callable[[], bool],
    ) -> None:
        self._id = job_id
        self._folder = folder
        self._process = process
        self._ledger = ledger
        self._times = times
        self._stopping = stopping
        self._asked: str | None = None
        """"save" or "end": what the process was asked for last."""
        self._kill_at = float("inf")
        self._report_at = 0.0
        self._silence = Silence()
        self.stalled = False

    async def until_ended(self, reporter: Reporter) -> None:
        """Raises ServerStopsError when the server stops first."""
        report: asyncio.Task[None] | None = None
        try:
            while (process := self._process) is not None and process.is_alive():
                await self._ledger.news.wait(self._times.poll_s)
                if self._stopping():
                    process.let_go()
                    raise ServerStopsError
                self._end_if_asked(process, (await self._ledger.get(self._id)).state)
                self._end_if_stuck(process)
                if report is None or report.done():
                    report = asyncio.create_task(self._report(reporter))
        finally:
            if report is not None:
                await report
        self._report_at = 0.0
        await self._report(reporter)

    def _end_if_asked(self, process: RunProcess, state: str) -> None:
        """A job that was paused may be cancelled before its checkpoint is there: then nothing waits for that."""
        if state == RUNNING:
            return
        wish = "end" if state == CANCELLED else "save"  # also one that is queued again already
        if self._asked is None or (self._asked, wish) == ("save", "end"):
            self._asked = wish
            process.interrupt()  # a second time it ends at once
            grace_s = self._times.pause_grace_s if wish == "save" else self._times.cancel_grace_s
            self._kill_at = time.monotonic() + grace_s
        elif time.monotonic() > self._kill_at:
            process.kill()

    def _end_if_stuck(self, process: RunProcess) -> None:
        if self._silence.seconds(self._folder.last_sign_of_life()) > self._times.stall_s:
            self.stalled = True
            process.kill()

    async def _report(self, reporter: Reporter) -> None:
        """What could not be told is told the next time."""
        if time.monotonic() < self._report_at:
            return
        try:
            await reporter.tick()
        except Exception:
            self._report_at = time.monotonic() + self._times.report_again_s
            logger.exception("the news of job %s could not be kept; trying again", self._id)
