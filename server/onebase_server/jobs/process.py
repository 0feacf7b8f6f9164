"""Processes of a run: started by their command line, told by signals, known by the run's lock. Knows no job.

A process is the leader of a session of its own: it outlives the server, takes none of its signals, and is killed
with all that it started. One that a server before us started is known by the lock that it holds.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from onebase_server.jobs.run_folder import RunFolder

OOM_SCORE = 700
"""Of 1000: added to a run's share of the memory when the kernel looks for whom to kill."""


class _Child(subprocess.Popen[bytes]):
    """A run outlives its server by design: a living one that is dropped, at whatever moment, is no leak to warn of."""

    def __del__(self) -> None:
        super().__del__(_warn=lambda *_args, **_named: None)  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True)
class RunCommand:
    """How runs are carried out. Tests put a script of their own in `program`."""

    program: Sequence[str] = (sys.executable, "-m", "onebase_training")
    env: Mapping[str, str] | None = None
    """None: the server's own."""
    nice: int = 10

    def start(self, arguments: Sequence[str], folder: RunFolder) -> "RunProcess | None":
        """Start the program in the run's folder, holding its lock. None if one is alive already."""
        with folder.locked() as lock:
            if lock is None:
                return None
            folder.status.unlink(missing_ok=True)  # an earlier process' last word is not this one's
            with folder.log.open("ab") as output:
                child = _Child(
                    [*self.program, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=None if self.env is None else dict(self.env),
                    start_new_session=True,
                    cwd=folder.path,
                    pass_fds=[lock],
                )
        _lower_priority(child.pid, self.nice)
        _offer_first(child.pid)
        return RunProcess(folder, child)


class RunProcess:
    """A process of a run: one that we started (`child` is set), or one that a server before us did."""

    def __init__(self, folder: RunFolder, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self._folder = folder
        self._child = child

    def is_alive(self) -> bool:
        """Until it and all its children have ended."""
        # The kernel drops the lock a moment before the exit code can be had.
        return (self._child is not None and self._child.poll() is None) or self._folder.is_alive()

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and for a process that another server started."""
        return None if self._child is None else self._child.poll()

    def let_go(self) -> None:
        """Leave it to the next server: it goes on, and nobody here waits for it any more."""
        if self._child is not None:
            self._child.returncode = 0  # Popen warns of a living child when it is dropped

    def interrupt(self) -> None:
        """Ask it to save a checkpoint and to end; it publishes nothing then."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            return
        for process in holders(self._folder):
            _send(process, signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it started: at once, also where its leader is dead and a child still lives."""
        if self._child is not None:
            try:
                os.killpg(self._child.pid, signal.SIGKILL)
            except ProcessLookupError:  # the whole group is gone
                return
        for process in holders(self._folder):
            _send(process, signal.SIGKILL)


class Silence:
    """How long a process has given no new sign of life, by a clock that stands still while the machine sleeps and
    that nobody sets: a laptop that wakes up must not kill a good run."""

    def __init__(self) -> None:
        self._last_sign: float | None = None
        self._since = time.monotonic()

    def seconds(self, sign: float) -> float:
        """`sign`: when the process last wrote anything, by whatever clock."""
        if sign != self._last_sign:
            self._last_sign, self._since = sign, time.monotonic()
        return time.monotonic() - self._since


def holders(folder: RunFolder) -> list[psutil.Process]:
    """The processes that were handed the run's lock, whoever started them: they run in its folder and hold it open.

    Both are asked: another server may open the lock for a moment, and a person may have a shell in the folder.
    """
    place = os.path.realpath(folder.path)
    lock = os.path.join(place, folder.lock.name)
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == place and any(file.path == lock for file in process.open_files()):
                found.append(process)
        except (psutil.Error, OSError):  # gone meanwhile, or another user's
            continue
    return found


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:  # ended between the look and the signal
        return


def _lower_priority(pid: int, nice: int) -> None:
    """Serving goes first. Done right after the start: threads that it makes later inherit it."""
    try:
        psutil.Process(pid).nice(nice)
    except psutil.Error:  # it has already ended, or the system forbids it: then it runs at our priority
        return


def _offer_first(pid: int) -> None:
    """When memory runs out the kernel should take a run, which goes on from its checkpoint, and not the server.

    Children that it starts later inherit it. Only Linux has the file; raising one's own number needs no rights.
    """
    with suppress(OSError):  # another system, or it has already ended
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))
