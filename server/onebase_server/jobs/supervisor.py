"""The supervisor: sees to it that every job in the table gets its turn and an end. One task of the server's loop.

The table is the queue. A start takes up what an earlier server left: live processes are watched on, dead ones are
settled or queued again. One supervisor works on a home folder at a time (a lock in it); further servers on the same
home answer requests and leave the work to the one.
"""

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from onebase.bases import resolve_base
from onebase.home import Home
from onebase.store import AdapterStore, Version
from onebase_server.jobs.checkpoints import FindBase
from onebase_server.jobs.files import FileService, is_abandoned
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.process import RunCommand
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.run_life import RunLife
from onebase_server.jobs.settle import Settler
from onebase_server.jobs.states import FINAL, QUEUED, RUNNING, VALIDATING
from onebase_server.jobs.validate import validate
from onebase_server.jobs.watch import RunTimes, ServerStopsError
from onebase_server.records.jobs import NewEvent
from onebase_server.records.tables import JobRow

logger = logging.getLogger(__name__)

LOCK = "supervisor.lock"
JOB_PREFIXES = ("ftjob-", "run-")
CHECKS = 2
"""Jobs whose data are checked or copied at a time: uploads use the same threads and the same disk."""
KEEPS_TURN_S = 30
"""Seconds from its making for which a job keeps its turn while its data are checked. Two jobs made one after the other
run in that order, whichever check ends first; a file that takes minutes holds nobody back longer."""


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """`max_running`: training processes at a time. `look_s`: how often other processes' changes are looked for."""

    max_running: int = 1
    look_s: float = 1.0
    sweep_s: float = 600.0
    times: RunTimes = field(default_factory=RunTimes)


class Supervisor:
    """`await start()`, `await stop()`. Stopping lets running processes go on: the next server takes them up."""

    def __init__(
        self,
        home: Home,
        ledger: Ledger,
        files: FileService,
        store: AdapterStore,
        command: RunCommand | None = None,
        config: SupervisorConfig | None = None,
        find_base: FindBase | None = None,
        each_round: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._home = home
        self._ledger = ledger
        self._records = ledger.records
        self._files = files
        self._store = store
        self._settler = Settler(ledger, files, store)
        self._command = command or RunCommand()
        self._config = config or SupervisorConfig()
        self._find_base = find_base or partial(resolve_base, home)
        self._each_round = each_round
        self.bring_near: Callable[[Version], Awaitable[None]] | None = None
        """Set by a server with an engine: loads a version before its name moves to it. Raises OnebaseError if it can't
        be served."""
        self.let_go: Callable[[], Awaitable[None]] | None = None
        """Set by a server with an engine: frees what it holds in memory of versions that the store no longer has."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._runs: set[str] = set()
        self._lives: dict[str, RunLife] = {}
        self._checks = asyncio.Semaphore(CHECKS)
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False
        self._lock: int | None = None

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._supervise(), name="job supervisor")

    async def stop(self) -> None:
        self._stopping = True
        self._ledger.news.tell()
        if self._loop is not None:
            await self._loop  # first: its last round may still begin a task
        await asyncio.gather(*self._tasks.values())
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _supervise(self) -> None:
        swept_at = let_go_at = float("-inf")
        now: Callable[[], float] = asyncio.get_running_loop().time
        while not self._stopping:
            try:
                if self._lock is None:
                    self._lock = self._take_lock()
                if self._lock is not None:
                    await self._dispatch()
                    if self._each_round is not None:
                        await self._each_round()
                    if now() - swept_at > self._config.sweep_s:
                        swept_at = now()
                        await self._clean_up()
                if self.let_go is not None and now() - let_go_at > self._config.sweep_s:
                    let_go_at = now()
                    await self.let_go()  # also without the lock: each server has its own memory
            except Exception:
                logger.exception("the job supervisor could not do its round")
            await self._ledger.news.wait(self._config.look_s)

    def _take_lock(self) -> int | None:
        self._home.locks.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._home.locks / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    async def _clean_up(self) -> None:
        """What crashes left half made, in files, store and runs."""
        await self._files.sweep()
        await asyncio.to_thread(self._store.sweep)
        paths = list(self._home.runs.iterdir()) if self._home.runs.is_dir() else []
        known = await self._records.ids()
        for path in paths:
            folder = RunFolder(self._home.runs, path.name)
            if path.name in known and folder.has_leftovers:
                job = await self._ledger.get(path.name)
                if job.state in FINAL and not job.run_open:
                    await asyncio.to_thread(folder.remove_checkpoints)
                    await asyncio.to_thread(folder.remove_data)
            elif path.name.startswith(JOB_PREFIXES) and path.name not in known and is_abandoned(path, time.time()):
                await asyncio.to_thread(folder.remove)

    async def _dispatch(self) -> None:
        for job in await self._records.with_open_run():
            if job.id not in self._tasks:
                self._begin(job.id, self._take_up(job), is_run=True)
        waiting = await self._records.in_states((VALIDATING, QUEUED))
        for job in waiting:
            if job.state == VALIDATING and job.id not in self._tasks:
                self._begin(job.id, self._validate(job), is_run=False)
        now = self._ledger.now()
        for job in waiting:
            if len(self._runs) >= self._config.max_running:
                return
            if job.state == VALIDATING and 0 <= now - job.created_at < KEEPS_TURN_S:
                return
            if job.state == QUEUED and not job.run_open and job.id not in self._tasks:
                self._begin(job.id, self._run(job), is_run=True)

    def _begin(self, job_id: str, work: Coroutine[Any, Any, None], *, is_run: bool) -> None:
        if is_run:
            self._runs.add(job_id)
        task = asyncio.create_task(self._guarded(job_id, work), name=f"job {job_id}")
        self._tasks[job_id] = task

    async def _guarded(self, job_id: str, work: Coroutine[Any, Any, None]) -> None:
        """However it ends, the job may be taken up again, and the next one gets its turn."""
        try:
            await work
        except ServerStopsError:
            return
        except Exception:
            logger.exception("job %s could not be carried on; trying again", job_id)
            await asyncio.sleep(self._config.look_s)
        finally:
            self._runs.discard(job_id)
            self._tasks.pop(job_id, None)
            self._ledger.news.tell()

    async def _validate(self, job: JobRow) -> None:
        async with self._checks:
            if not self._stopping:
                folder = RunFolder(self._home.runs, job.id)
                look_s = self._config.look_s
                await validate(job, folder, self._ledger, self._settler, look_s, lambda: self._stopping)

    async def _run(self, job: JobRow) -> None:
        event = NewEvent(f"started:{job.attempt + 1}", "Fine-tuning job started")
        values = {
            "state": RUNNING,
            "run_open": True,
            "attempt": job.attempt + 1,
            "started_at": job.started_at or self._ledger.now(),
        }
        started = await self._ledger.change(job.id, values, when=(QUEUED,), events=[event])
        if started is not None:  # else it was cancelled just now
            await self._live(started, taken_up=False)

    async def _take_up(self, job: JobRow) -> None:
        await self._live(job, taken_up=True)

    async def _live(self, job: JobRow, *, taken_up: bool) -> None:
        """Kept over an error, so that the next try still has the process as its child. A disk or a database may work
        again, whatever else goes wrong again and again is a fault of ours: it ends the job, and not the queue."""
        life = self._lives.setdefault(job.id, self._new_life(job))
        try:
            await life.carry_out(job, taken_up=taken_up)
        except (OSError, SQLAlchemyError, ServerStopsError):
            raise
        except Exception:
            if not life.is_hopeless():
                raise
            logger.exception("job %s can't be carried on", job.id)
            await life.give_up()
        del self._lives[job.id]

    def _new_life(self, job: JobRow) -> RunLife:
        return RunLife(
            job,
            self._home,
            self._ledger,
            self._settler,
            self._store,
            self._command,
            self._config.times,
            self._find_base,
            lambda: self._stopping,
            self._near,
        )

    async def _near(self, version: Version) -> None:
        if self.bring_near is not None:
            await self.bring_near(version)
