"""The training process as the server sees it: started by its command line, watched by its pid, told by signals."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class TrainerCommand:
    """How a run is carried out. Tests put a script of their own in `program`."""

    program: Sequence[str] = (sys.executable, "-m", "onebase_training", "train")
    env: Mapping[str, str] | None = None
    """None: the server's own."""
    nice: int = 10

    def start(self, recipe: Path, home: Path, status: Path, log: Path) -> "TrainerProcess":
        """Start it in a session of its own, so that it outlives the server and takes none of its signals."""
        command = [*self.program, str(recipe), "--home", str(home), "--status", str(status)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if self.env is None else dict(self.env),
                start_new_session=True,
                cwd=recipe.parent,
            )
        handle = psutil.Process(process.pid)
        lower_priority(handle, self.nice)
        return TrainerProcess(process.pid, handle.create_time(), process)


def lower_priority(process: psutil.Process, nice: int) -> None:
    """Serving goes first. Done right after the start: threads that the trainer makes later inherit it."""
    try:
        process.nice(nice)
    except psutil.Error:  # it has already ended, or the system forbids it: then it trains at our priority
        return


class TrainerProcess:
    """A running trainer: started by us (`child` is set) or by the server before us."""

    def __init__(self, pid: int, created: float, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self.created = created
        self._child = child

    @classmethod
    def find(cls, pid: int, created: float) -> "TrainerProcess | None":
        """The process of that pid, if it is still the one that began then."""
        found = cls(pid, created)
        return found if found.is_alive() else None

    def is_alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 0.01
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and for a process that another server started."""
        return None if self._child is None else self._child.poll()

    def let_go(self) -> None:
        """Watch it no longer; it goes on. Popen would warn that its child still runs, which is the point here."""
        if self._child is not None:
            self._child.returncode = 0
            self._child = None

    def interrupt(self) -> None:
        """Ask it to stop cleanly; it publishes nothing then."""
        self._signal(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._signal(self.pid, signal.SIGKILL)

    def _signal(self, pid: int, number: int) -> None:
        if self.is_alive():
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # ended between the look and the signal
                return
