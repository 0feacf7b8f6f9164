"""Retraining beside serving: one run at a time, each a process of its own, each a folder that outlives the server.

A run that fails, is killed or is cancelled publishes nothing: serving does not notice. One that ends well has
published the next version into the store itself; the server finds it there. No HTTP here, and no torch.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from onebase.errors import InvalidInput, NotFound, Overloaded
from onebase.home import Home
from onebase_server.jobs.recipe import RetrainOrder, write_recipe
from onebase_server.jobs.run_record import RUN_ID, Run, RunFolder, RunState, new_run, with_progress
from onebase_server.jobs.trainer_process import TrainerCommand, TrainerProcess

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """Times in seconds."""

    queue_limit: int = 16
    poll_s: float = 0.2
    cancel_grace_s: float = 30.0
    """What a cancelled trainer gets to end cleanly before it is killed."""


class Supervisor:
    """The queue and its one thread. All methods may be called from any thread."""

    def __init__(
        self,
        home: Home,
        command: TrainerCommand | None = None,
        config: SupervisorConfig | None = None,
    ) -> None:
        self._home = home
        self._command = command or TrainerCommand()
        self._config = config or SupervisorConfig()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._queue: deque[str] = deque()
        self._running: str | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    # Life

    def start(self) -> None:
        """Take up what an earlier server left: its queue, and its running trainer if that still lives."""
        left = [run for run in self.list() if not run.is_final]
        for run in sorted(left, key=lambda run: (run.state != "running", run.created_at, run.id)):
            self._queue.append(run.id)
        self._thread = threading.Thread(target=self._work, name="retrain-supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let go: a running trainer goes on, and the next server takes it up."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()

    # Orders

    def submit(self, order: RetrainOrder) -> Run:
        """Queue a run. Raises Overloaded when too many wait."""
        run = new_run(order.adapter, str(order.dataset), order.preset, dict(order.hyperparameters or {}))
        folder = self._folder(run.id)
        with self._wake:
            if len(self._queue) >= self._config.queue_limit:
                raise Overloaded(f"{len(self._queue)} retrain runs wait already", retry_after_s=60)
            folder.create()
            write_recipe(folder.recipe, order)
            folder.write(run)  # last: the run exists from here on
            self._queue.append(run.id)
            self._wake.notify_all()
        logger.info("run %s queued: adapter %s", run.id, order.adapter)
        return run

    def cancel(self, run_id: str) -> Run:
        """Cancel a waiting or running one. Raises NotFound, or InvalidInput if it has ended."""
        with self._wake:
            run = self._read(run_id)
            if run.is_final:
                raise InvalidInput(f"run {run_id} has already {run.state}", param="id", code="run_has_ended")
            if run_id in self._queue:
                self._queue.remove(run_id)
                run = replace(run, state="cancelled", finished_at=int(time.time()))
            else:
                run = replace(run, cancel_requested=True)
            self._folder(run_id).write(run)
            self._wake.notify_all()
            return run

    def get(self, run_id: str) -> Run:
        """The run with its progress. Raises NotFound."""
        with self._lock:
            run = self._read(run_id)
        return self._with_progress(run)

    def list(self) -> list[Run]:
        """All runs that the home folder knows, newest first."""
        folders = sorted(self._home.runs.iterdir(), reverse=True) if self._home.runs.is_dir() else []
        runs = [RunFolder(self._home.runs, each.name).read() for each in folders if RUN_ID.match(each.name)]
        return [self._with_progress(run) for run in runs if run is not None]

    # The thread

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                self._running = self._queue.popleft()
                run = self._read(self._running)
            try:
                self._carry_out(run)
            except Exception:
                # whatever it was, the next run in the queue must get its turn
                logger.exception("run %s could not be carried out", run.id)
                self._end(run.id, "failed", error=error_of("internal_error", "the server could not start the trainer"))
            self._running = None

    def _carry_out(self, run: Run) -> None:
        folder = self._folder(run.id)
        process = self._take_up(run) if run.state == "running" else self._launch(run)
        if process is not None and not self._watch(run.id, process):
            process.let_go()  # the server stops; the trainer goes on, and the next server takes it up
            return
        self._conclude(run.id, folder, process)

    def _launch(self, run: Run) -> TrainerProcess:
        folder = self._folder(run.id)
        process = self._command.start(folder.recipe, self._home.root, folder.status, folder.log)
        logger.info("run %s started: pid %d", run.id, process.pid)
        self._update(run.id, state="running", started_at=int(time.time()), pid=process.pid, pid_created=process.created)
        return process

    def _take_up(self, run: Run) -> TrainerProcess | None:
        if run.pid is None or run.pid_created is None:
            return None
        process = TrainerProcess.find(run.pid, run.pid_created)
        logger.info("run %s taken up: its trainer %s", run.id, "lives" if process else "has ended")
        return process

    def _watch(self, run_id: str, process: TrainerProcess) -> bool:
        """Until the process ends; False if the server stops first."""
        kill_at: float | None = None
        while process.is_alive():
            with self._wake:
                self._wake.wait(self._config.poll_s)
                if self._stopping:
                    return False
                cancelled = self._read(run_id).cancel_requested
            if cancelled and kill_at is None:
                process.interrupt()
                kill_at = time.monotonic() + self._config.cancel_grace_s
            elif kill_at is not None and time.monotonic() > kill_at:
                process.kill()
        return True

    def _conclude(self, run_id: str, folder: RunFolder, process: TrainerProcess | None) -> None:
        """The outcome, from the trainer's last word; without one it died."""
        status = folder.read_status()
        said = status.get("state")
        if said == "succeeded" and status.get("version"):
            self._end(run_id, "succeeded", version=str(status["version"]))
        elif self._read(run_id).cancel_requested or said == "cancelled":
            self._end(run_id, "cancelled")
        elif said == "failed":
            given = status.get("error")
            self._end(
                run_id, "failed", error=given if isinstance(given, dict) else error_of("training_failed", str(given))
            )
        else:
            self._end(run_id, "failed", error=error_of("trainer_died", self._cause_of_death(folder, process)))

    @staticmethod
    def _cause_of_death(folder: RunFolder, process: TrainerProcess | None) -> str:
        code = process.exit_code if process is not None else None
        how = "ended without a result" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        last = folder.log_tail(400).splitlines()[-1:] or ["nothing"]
        return f"the training process {how}; its log {folder.log} ends: {last[0]}"

    def _end(
        self, run_id: str, state: RunState, version: str | None = None, error: dict[str, Any] | None = None
    ) -> None:
        logger.info(
            "run %s %s%s", run_id, state, f": {version}" if version else f": {error['message']}" if error else ""
        )
        self._update(run_id, state=state, finished_at=int(time.time()), version=version, error=error, pid=None)

    # The record

    def _update(self, run_id: str, **changes: Any) -> None:
        with self._lock:
            self._folder(run_id).write(replace(self._read(run_id), **changes))

    def _read(self, run_id: str) -> Run:
        run = self._folder(run_id).read() if RUN_ID.match(run_id) else None
        if run is None:
            raise NotFound(f"No such run: {run_id}", param="id")
        return run

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(self._home.runs, run_id)

    def _with_progress(self, run: Run) -> Run:
        return with_progress(run, self._folder(run.id).read_status())


def error_of(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None}
