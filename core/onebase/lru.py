"""A bounded memory for what can be had again from the disk. Thread-safe; knows nothing of what it holds."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `limit` values; the one that was not asked for longest goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def keep(self, key: K, value: V, *, push_out: bool = True) -> None:
        """Without `push_out` only where there is room: who walks through more than fits must not empty it."""
        with self._lock:
            if key not in self._values and len(self._values) >= self.limit:
                if not push_out:
                    return
                self._values.popitem(last=False)
            self._values[key] = value
            self._values.move_to_end(key)

    def forget(self, key: K) -> None:
        with self._lock:
            self._values.pop(key, None)
