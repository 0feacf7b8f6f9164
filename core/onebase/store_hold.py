"""Who still reads a version's files: a shared lock on its manifest, between threads and processes.

A version's name goes at once, its files only when nobody holds them any more. The kernel drops a lock with its process,
so the dead hold nothing. Knows neither pointers nor names.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebase.adapter import MANIFEST


class Hold:
    """The files of one version stay until `close`. Raises FileNotFoundError if they have gone, or are going."""

    def __init__(self, folder: Path) -> None:
        path = folder / MANIFEST
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(self._fd), os.stat(path))
        except BlockingIOError:
            is_there = False
        except BaseException:
            self.close()
            raise
        if not is_there:  # between opening and locking it was moved out of sight
            self.close()
            raise FileNotFoundError(path)

    def close(self) -> None:
        """Any number of times."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def unheld(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether nobody holds the version, which stays so inside the block. `wait`: until nobody does."""
    path = folder / MANIFEST
    mode = os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY  # over NFS only a writer may lock alone
    try:
        fd = os.open(path, mode | os.O_CLOEXEC)
    except FileNotFoundError:  # damaged, or gone: nobody can hold it
        yield True
        return
    try:
        yield _lock_alone(fd, wait=wait)
    finally:
        os.close(fd)


def _lock_alone(fd: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
