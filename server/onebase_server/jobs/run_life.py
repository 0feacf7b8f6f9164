"""One run, from its first process to its end: start, watch, stop, evaluate, settle. The supervisor has many of these.

What to do next is read from the table, the store and the run's folder each time, never from memory: so a server that
takes a run up in the middle walks the same path as the one that began it.
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from onebase.errors import OnebaseError
from onebase.home import Home
from onebase.serving_note import RESUME_EXIT
from onebase.store import AdapterStore, Version
from onebase_server.jobs.checkpoints import Checkpoints, FindBase, finished_checkpoints
from onebase_server.jobs.gate import Verdict, judge, read_measured
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.orders import Gate
from onebase_server.jobs.process import RunCommand, RunProcess
from onebase_server.jobs.progress import Reporter
from onebase_server.jobs.recipe import evaluate_command, train_command, write_recipe
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.settle import LESS_MEMORY, Settler, job_error
from onebase_server.jobs.states import CANCELLED, FINAL, FINE_TUNING, PUBLISHING, RUNNING
from onebase_server.jobs.watch import RunTimes, Watch
from onebase_server.records.tables import JobRow

logger = logging.getLogger(__name__)


class RunLife:
    """Carries out one job, and may be told to again after an error. `stopping`: whether the server is going down.
    `bring_near`: loads a version where it will be served; raises OnebaseError if it can't be."""

    def __init__(
        self,
        job: JobRow,
        home: Home,
        ledger: Ledger,
        settler: Settler,
        store: AdapterStore,
        command: RunCommand,
        times: RunTimes,
        find_base: FindBase,
        stopping: Callable[[], bool],
        bring_near: Callable[[Version], Awaitable[None]],
    ) -> None:
        self._id = job.id
        self._home = home
        self._ledger = ledger
        self._settler = settler
        self._store = store
        self._command = command
        self._times = times
        self._find_base = find_base
        self._stopping = stopping
        self._bring_near = bring_near
        self._folder = RunFolder(home.runs, job.id)
        self._process: RunProcess | None = None
        self._stalled = False
        self._evaluations = 0
        self._errors = 0

    async def carry_out(self, job: JobRow, *, taken_up: bool) -> None:
        """Until the run is settled. `taken_up`: another server began it, and its process may still live.

        Raises ServerStopsError when the server stops first.
        """
        if not taken_up:
            await self._train(job)
        elif self._process is None and self._folder.is_alive():
            self._process = RunProcess(self._folder)
            logger.info("job %s taken up: its process lives", self._id)
        await self._watch()
        while True:
            job = await self._ledger.get(self._id)
            if job.state != RUNNING:
                return await self._settle_unwatched(job)
            version = self._settler.published(job)
            if version is None:
                return await self._settle_untrained(job)
            verdict = self._judge(job, version)
            if isinstance(verdict, Verdict) and not verdict.passed:
                error = job_error("gate_not_passed", verdict.reason)
                return await self._settler.fail(
                    job, self._folder, error, gate_report=verdict.report(), version=version.id
                )
            if verdict is None:
                return await self._publish(job, version)
            if isinstance(verdict, Verdict):
                await self._ledger.change(self._id, {"gate_report": verdict.report()}, when=(RUNNING,))
                return await self._publish(job, version)
            if not await self._evaluate(job, verdict):
                return None

    def is_hopeless(self) -> bool:
        """Asked after an error that nobody foresaw: whether there were as many of them as processes may be lost."""
        self._errors += 1
        return self._errors >= self._times.max_losses

    async def give_up(self) -> None:
        """End the process and the job, whatever state they are in."""
        (self._process or RunProcess(self._folder)).kill()
        job = await self._ledger.get(self._id)
        if job.state in FINAL:
            await self._settler.let_go(job)
        else:
            error = job_error("internal_error", "The server could not carry the job out; its log says why")
            await self._settler.fail(job, self._folder, error)

    async def _publish(self, job: JobRow, version: Version) -> None:
        try:
            await self._bring_near(version)
        except OnebaseError as error:
            await self._settler.take_back(job)
            logger.warning("job %s: %s can't be served: %s", self._id, version.id, error.message)
            reason = f"{version.id} can't be served, so it was not published: {self._folder.told(error.message)}"
            return await self._settler.fail(job, self._folder, job_error("version_unservable", reason))
        if await self._settler.publish(job, self._folder, version):
            await self._settler.succeed(job, self._folder)
        else:
            await self._settle_unwatched(await self._ledger.get(self._id))
        return None

    async def _settle_unwatched(self, job: JobRow) -> None:
        """Cancelled, paused, or left in the middle of publishing by a crash."""
        if job.state == PUBLISHING:
            await self._settler.succeed(job, self._folder)
        elif job.state == CANCELLED:
            await self._settler.discard(job, self._folder)
        else:
            await self._settler.let_go(job)

    async def _settle_untrained(self, job: JobRow) -> None:
        """No version came of it: the trainer said why, or it was lost."""
        status = self._folder.read_status()
        if job.version is not None or status.state == "succeeded":
            return await self._settler.fail_removed(job, self._folder)
        if status.state == "failed":
            given = status.error or {}
            error = job_error(
                str(given.get("code") or "training_failed"),
                str(given.get("message") or status.message or "the training process failed without a word"),
                given.get("param") if isinstance(given.get("param"), str) else None,
            )
            return await self._settler.fail(job, self._folder, error)
        reason = self._cause_of_death()
        exit_code = (self._process.exit_code if self._process is not None else None) or 0
        told_to_stop = status.state == "cancelled"  # by a signal, and not of ours: such as the machine's shutting down
        gave_up_itself = exit_code > 0 and exit_code != RESUME_EXIT and not told_to_stop
        saved_step = max((step for step, _ in finished_checkpoints(self._folder.work)), default=0)
        losses = 1 if saved_step > job.saved_step else job.losses + 1
        if losses < self._times.max_losses and not gave_up_itself:
            return await self._settler.requeue(job, reason, saved_step=saved_step, losses=losses)
        code = "trainer_stalled" if self._stalled else "trainer_died"
        message = f"{reason} (attempt {job.attempt}); its log ends: {self._last_words()}"
        if exit_code == -signal.SIGKILL and not self._stalled:
            message += f". {LESS_MEMORY}"
        return await self._settler.fail(job, self._folder, job_error(code, message))

    def _last_words(self) -> str:
        """The log's last line, as the job's owner may read it; the server's log gets more of it, as it is."""
        tail = self._folder.log_tail()
        logger.warning("job %s: the log of its process, %s, ends:\n%s", self._id, self._folder.log, tail)
        return self._folder.told((tail.splitlines() or ["nothing"])[-1][-400:])

    def _cause_of_death(self) -> str:
        if self._stalled:
            return f"The training process said nothing for {self._times.stall_s:.0f} seconds"
        code = None if self._process is None else self._process.exit_code
        if code is None:
            return "The training process was lost"
        if code < 0:
            return f"The training process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return f"The training process ended with exit code {code} and no result"

    # Processes

    async def _train(self, job: JobRow) -> None:
        if self._settler.published(job) is not None:  # it was paused just when it had finished
            return
        await asyncio.to_thread(write_recipe, job, self._folder)
        await self._start(train_command(self._folder, self._home.root, job.fine_tuned_model or ""))
        logger.info("job %s started, attempt %d", self._id, job.attempt)

    async def _start(self, arguments: list[str]) -> None:
        started = await asyncio.to_thread(self._command.start, arguments, self._folder)
        self._process = started or RunProcess(self._folder)

    async def _watch(self) -> None:
        """Until the process has ended, telling what it does; stops it if the job is cancelled or paused, or stalls."""
        watch = Watch(self._id, self._folder, self._process, self._ledger, self._times, self._stopping)
        await watch.until_ended(await self._reporter())
        self._stalled = self._stalled or watch.stalled

    async def _reporter(self) -> Reporter:
        job = await self._ledger.get(self._id)
        checkpoints = None
        if job.kind == FINE_TUNING:
            kept = await self._ledger.records.checkpoints(self._id, after=None, limit=100)
            known = {point.step: point.version for point in kept.rows}
            checkpoints = Checkpoints(job, self._folder, self._store, self._find_base, known)
        return Reporter(job, self._folder, self._ledger, checkpoints)

    # The gate

    def _judge(self, job: JobRow, candidate: Version) -> "Verdict | list[Version] | None":
        """The verdict; None if there is no gate; or the versions that have to be measured first."""
        if job.gate is None:
            return None
        entry = self._store.get(candidate.name)
        current = entry.current if entry is not None else None
        versions = [candidate] if current is None or current.id == candidate.id else [candidate, current]
        measured = read_measured(self._folder.evaluation)
        if any(version.id not in measured for version in versions):
            return versions
        first, *others = [measured[version.id] for version in versions]
        return judge(Gate(**job.gate), first, others[0] if others else None)

    async def _evaluate(self, job: JobRow, versions: list[Version]) -> bool:
        """Measure them. False if it can't be done, and the job has failed for it."""
        ids = [version.id for version in versions]
        if self._evaluations >= self._times.max_losses:
            message = f"{ids[0]} could not be evaluated, so it was not published; the log ends: {self._last_words()}"
            await self._settler.fail(job, self._folder, job_error("gate_not_measured", message), version=ids[0])
            return False
        self._evaluations += 1
        values = {"message": f"evaluating {' and '.join(ids)}", "version": ids[0]}
        await self._ledger.change(self._id, values, when=(RUNNING,))
        gate = Gate(**(job.gate or {}))
        await self._start(evaluate_command(self._folder, self._home.root, ids, gate.max_examples))
        await self._watch()
        return True
