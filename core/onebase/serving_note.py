"""What a serving process tells training processes on the same home: whether it works now, and where its base lies.

`<home>/serving/<id>.load` is a handful of counters in shared memory, written by the engine thread at the cost of a few
stores; the server holds a lock on it, which the kernel drops when the server dies, however it dies. `<id>.json` says
where its weights are. No torch; knows neither engine nor trainer.
"""

import contextlib
import fcntl
import json
import mmap
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
_VERSION, _STATE, _RUNNING, _WAITING, _STEPS = range(5)
_FIELDS: Final = 8
_BYTES: Final = _FIELDS * 8

LOADING, READY = 0, 1

RESUME_EXIT: Final = 75
"""Exit code of a training process that lost the server whose base it used: it is to be started again."""


@dataclass(frozen=True, slots=True)
class Load:
    """One look at a server: sequences that run and wait, and the steps since its start."""

    running: int = 0
    waiting: int = 0
    steps: int = 0

    @property
    def is_busy(self) -> bool:
        return self.running + self.waiting > 0


class ServerNote:
    """The server's side. Counters may be written by one thread without a lock: each is one aligned store."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd
        self._map = mmap.mmap(fd, _BYTES)
        self._fields = memoryview(self._map).cast("q")
        self._last = (0, 0, 0)

    @classmethod
    def open(cls, folder: Path) -> "ServerNote":
        """A new note in `folder` (`Home.serving`), still loading; notes of dead servers are removed."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(folder)
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        hidden, path = folder / f".{name}", folder / f"{name}.load"
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # Locked before it gets its name: nobody ever sees it without a living owner.
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.ftruncate(fd, _BYTES)
        note = cls(path, fd)
        note._fields[_VERSION] = FORMAT
        os.rename(hidden, path)
        return note

    def ready(self, base: Mapping[str, Any] | None = None) -> None:
        """The base is loaded. `base` describes its weights for processes that can use them; None: they can't."""
        if base is not None:
            hidden = self._path.with_name(f".{self._path.stem}.json")
            with os.fdopen(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(base, file)
            os.rename(hidden, self._path.with_suffix(".json"))
        self._fields[_STATE] = READY

    def tell(self, running: int, waiting: int, steps: int) -> None:
        """Called around every step."""
        if (running, waiting, steps) != self._last:
            self._last = (running, waiting, steps)
            self._fields[_RUNNING], self._fields[_WAITING], self._fields[_STEPS] = running, waiting, steps

    def close(self) -> None:
        """The server no longer serves. The lock goes with the process at the latest."""
        if self._fd < 0:
            return
        self._path.with_suffix(".json").unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        self._fields.release()
        self._map.close()
        os.close(self._fd)
        self._fd = -1


class SeenServer:
    """The reader's side: one server's note, kept open. A server that is dead stays dead."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or ValueError when the note has gone or is another version's."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._dead = False
        try:
            self._map = mmap.mmap(self._fd, _BYTES, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._fd)
            raise
        self._fields = memoryview(self._map).cast("q")
        if self._fields[_VERSION] != FORMAT:
            self.close()
            raise ValueError(f"{path} has another format")

    def is_alive(self) -> bool:
        """Whether its process lives. One system call."""
        if not self._dead and _is_unlocked(self._fd):
            self._dead = True
        return not self._dead

    @property
    def is_ready(self) -> bool:
        return self._fields[_STATE] == READY

    def load(self) -> Load:
        return Load(self._fields[_RUNNING], self._fields[_WAITING], self._fields[_STEPS])

    def base(self) -> dict[str, Any] | None:
        """What it says of its base's weights; None if nobody else can use them."""
        try:
            described = json.loads(self.path.with_suffix(".json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return described if isinstance(described, dict) else None

    def close(self) -> None:
        self._fields.release()
        self._map.close()
        os.close(self._fd)


def living_servers(folder: Path, known: Mapping[Path, SeenServer] | None = None) -> dict[Path, SeenServer]:
    """Every server that lives, by its note's path. Those of `known` are kept open, its dead ones are closed."""
    known = known or {}
    found: dict[Path, SeenServer] = {}
    for path in folder.glob("*.load") if folder.is_dir() else ():
        server = known.get(path)
        if server is None:
            with contextlib.suppress(OSError, ValueError):
                server = SeenServer(path)
        if server is not None and server.is_alive():
            found[path] = server
        elif server is not None and path not in known:
            server.close()
    for path, server in known.items():
        if path not in found:
            server.close()
    return found


def _sweep(folder: Path) -> None:
    for path in folder.glob("*.load"):
        with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
            if _is_unlocked(fd):
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_unlocked(fd: int) -> bool:
    """Its owner is dead: the living hold the lock all along."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True
