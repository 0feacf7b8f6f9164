"""Adapter versions in host memory: a budget in bytes, who may be read next, who leaves first.

Least recently used leaves first; who is pinned, being copied to a slot, or waited for by a sequence stays. Engine
thread only.
"""

from collections import OrderedDict

from onebase_server.engine.config import EngineConfig
from onebase_server.engine.residence import Place, Residence
from onebase_server.engine.runner import HostAdapter


class HostCache:
    """Versions whose `host` is set."""

    def __init__(self, config: EngineConfig) -> None:
        self._budget = config.host_budget_bytes
        self._most_blind_reads = 2 * config.loader_threads
        self._entries: OrderedDict[str, Residence] = OrderedDict()  # least recently used first
        self._overdraft: Residence | None = None
        """The one version that may be read although the budget is spent: the first in its turn."""
        self.num_loading = 0
        """Reads under way."""
        self.bytes = 0

    @property
    def entries(self) -> list[Residence]:
        """Least recently used first."""
        return list(self._entries.values())

    def touch(self, entry: Residence) -> None:
        """It was used just now."""
        if entry.ref.digest in self._entries:
            self._entries.move_to_end(entry.ref.digest)

    def may_read(self, entry: Residence) -> bool:
        """Whether the sequence whose turn it is may have its version read now."""
        return self.has_room() or self._may_overdraw(entry)

    def has_room(self) -> bool:
        """Whether another read is likely to stay inside the budget, counting those in flight at the mean size."""
        mean = self.bytes / len(self._entries) if self._entries else 0.0
        if not self._entries and self.num_loading >= self._most_blind_reads:
            return False
        return self.bytes + (self.num_loading + 1) * mean <= self._budget

    def _may_overdraw(self, entry: Residence) -> bool:
        holder = self._overdraft
        if holder is None or holder is entry or holder.slot is not None or holder.num_leases == 0:
            self._overdraft = entry
            return True
        return False

    def add(self, entry: Residence, host: HostAdapter) -> None:
        """It has been read. The budget holds after the next `trim`."""
        entry.host = host
        self.bytes += host.nbytes
        self._entries[entry.ref.digest] = entry

    def drop(self, entry: Residence) -> None:
        if entry.host is not None:
            self.bytes -= entry.host.nbytes
            entry.host = None
            del self._entries[entry.ref.digest]

    def trim(self) -> None:
        """Drop who may leave until the budget holds."""
        if self.bytes <= self._budget:
            return
        for entry in self.entries:
            in_use = entry.num_leases > 0 and entry.slot is None
            if not (in_use or entry.is_pinned or entry.place is Place.COPYING):
                self.drop(entry)
                if self.bytes <= self._budget:
                    return
