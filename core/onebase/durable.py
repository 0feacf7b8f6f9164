"""Files that survive a crash whole: written beside, fsynced, renamed; and a lock between processes.

No adapters here. All of it is POSIX: rename is atomic within one file system, and the kernel drops a `flock` when its
process dies, so a kill -9 leaves no lock behind.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from onebase.errors import InvalidInput

_CHUNK = 1 << 20


def fsync_folder(folder: Path) -> None:
    """Make the folder's own entries durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and make it durable. Raises FileExistsError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in place of the file at once: a reader sees the old bytes or the new, never a mixture."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def clear_temporaries(path: Path) -> None:
    """Remove what killed `replace_file` calls left beside the file. Only under a lock that all its writers hold."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def copy_file(source: Path, dest: Path, copied: Callable[[int], None] = lambda _: None) -> str:
    """Copy one regular file durably and return its sha256. Raises InvalidInput for a link or anything special.

    `copied` is told the bytes of each piece, and may raise to end it.
    """
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidInput(f"{source.name} is a link or can't be read: {error.strerror}", param="adapter") from error
    hasher = hashlib.sha256()
    with os.fdopen(fd, "rb") as reader, dest.open("xb") as writer:
        if not stat.S_ISREG(os.fstat(reader.fileno()).st_mode):
            raise InvalidInput(f"{source.name} is not a plain file", param="adapter")
        while chunk := reader.read(_CHUNK):
            hasher.update(chunk)
            writer.write(chunk)
            copied(len(chunk))
        writer.flush()
        os.fsync(writer.fileno())
    return hasher.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file exclusively, against other processes and other threads of this one. Waits for it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Staging:
    """Scratch folders on the store's own file system. Each has an owner's lock; the dead's are swept.

    `gate` is the store's lock file: a folder and its lock come into being, and are swept, only while it is held, so a
    sweeper never sees a folder whose owner has not locked it yet.
    """

    def __init__(self, root: Path, gate: Path) -> None:
        self._root = root
        self._gate = gate

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """A new empty folder; whatever is still in it at the end is removed."""
        with locked(self._gate):
            self._root.mkdir(exist_ok=True)
            self._sweep()
            path = self._root / uuid.uuid4().hex
            fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
            os.close(fd)

    def sweep(self) -> None:
        """Remove what dead processes left."""
        with locked(self._gate):
            self._sweep()

    def _sweep(self) -> None:
        if not self._root.is_dir():
            return
        for lock in self._root.glob("*.lock"):
            if _is_abandoned(lock):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)


def _is_abandoned(lock: Path) -> bool:
    """Nobody holds the lock: its owner is dead, since the living hold it all along."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
