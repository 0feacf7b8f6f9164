"""What uploads under way take of their owners' disk quotas: counted as the bytes come, so that two cannot both have
what is left. In memory, of this server only: what is kept is in the table, and has the last word (`Room.check`).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Owner:
    stored: int = 0
    """Bytes of files in the table."""
    coming: int = 0
    """Bytes of uploads that are not in it yet."""
    open: int = 0


class Room:
    """One upload's. `take` may be called from any thread."""

    def __init__(self, owner: _Owner, lock: threading.Lock, quota: int, refuse: Callable[[int], Exception]) -> None:
        self._owner = owner
        self._lock = lock
        self._quota = quota
        self._refuse = refuse
        self.bytes = 0
        self.is_kept = False
        """Set it once the file is in the table."""

    def take(self, count: int) -> None:
        """So many bytes more have come. Raises what `refuse(left)` gives, counting none of them, if they don't fit."""
        with self._lock:
            left = self._quota - self._owner.stored - self._owner.coming
            if count > left:
                raise self._refuse(max(0, left))
            self._owner.coming += count
            self.bytes += count

    def check(self, stored: int) -> None:
        """The whole upload, against what the table holds as its row is made: files may have got into it since the room
        was opened. Raises what `refuse(left)` gives if it does not fit."""
        left = self._quota - stored
        if self.bytes > left:
            raise self._refuse(max(0, left))


class UploadRooms:
    """All of a server's uploads under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[str, _Owner] = {}

    @contextmanager
    def open(self, owner: str, stored: int, quota: int, refuse: Callable[[int], Exception]) -> Iterator[Room]:
        """Room for one upload of an owner with `stored` bytes in the table."""
        with self._lock:
            entry = self._owners.setdefault(owner, _Owner())
            entry.stored = stored
            entry.open += 1
        room = Room(entry, self._lock, quota, refuse)
        try:
            yield room
        finally:
            with self._lock:
                entry.coming -= room.bytes
                entry.stored += room.bytes if room.is_kept else 0
                entry.open -= 1
                if not entry.open:
                    del self._owners[owner]
