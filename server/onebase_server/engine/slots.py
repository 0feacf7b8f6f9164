"""The device's slots: which version is in which, who may take one, and who has to leave.

Least recently used leaves first. A version that drains leaves its slot to the one it drains for, and to nobody else.
Knows the runner's slots, nothing of files or host memory. Engine thread only.
"""

import logging
from collections import OrderedDict

from onebase.errors import AdapterInvalid, EngineError
from onebase_server.engine.residence import Residence
from onebase_server.engine.runner import DeviceLost, HostAdapter, Runner

logger = logging.getLogger(__name__)


class DeviceSlots:
    """All slots of one runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._entries: OrderedDict[str, Residence] = OrderedDict()  # least recently used first
        self._free = list(range(runner.limits.num_slots - 1, -1, -1))
        self._copying: list[Residence] = []
        self._reserved_for: Residence | None = None
        """The one version that may take slots now: others have drained for it, and it needs more than one's rows."""

    @property
    def residents(self) -> list[Residence]:
        """Versions in slots, least recently used first."""
        return list(self._entries.values())

    @property
    def is_copying(self) -> bool:
        """Whether a copy to a slot is on its way: `poll` again soon."""
        return bool(self._copying)

    def touch(self, entry: Residence) -> None:
        """It was used just now."""
        if entry.slot is not None:
            self._entries.move_to_end(entry.ref.digest)

    def place(self, entry: Residence) -> bool:
        """Start the copy to a slot, evicting who may leave; False if there is no room now.

        Raises EngineError if there never will be, or the copy fails; AdapterInvalid if its values are bad;
        DeviceLost if the device is to blame."""
        assert entry.host is not None
        slot = self._take(entry, entry.host)
        if slot is None:
            if not self._entries and not self._is_reserved_for_other(entry):
                self._reserved_for = None  # it will never need what has drained for it
                raise EngineError(f"{entry.ref.id} does not fit into the server's LoRA rows; raise them")
            return False
        self._copy(slot, entry, entry.host)
        return True

    def place_if_free(self, entry: Residence) -> None:
        """As `place`, but nobody has to leave for it."""
        assert entry.host is not None
        if self._free and not self._is_reserved_for_other(entry) and self._runner.can_load(entry.host):
            self._copy(self._free.pop(), entry, entry.host)

    def poll(self) -> tuple[list[Residence], list[tuple[Residence, AdapterInvalid]]]:
        """Versions whose copy has finished since the last call, and those that lost their slot again, as what has
        arrived can't be served."""
        if not self._copying:
            return [], []
        copied: list[Residence] = []
        refused: list[tuple[Residence, AdapterInvalid]] = []
        still: list[Residence] = []
        for entry in self._copying:
            assert entry.slot is not None
            try:
                (copied if self._runner.slot_ready(entry.slot) else still).append(entry)
            except AdapterInvalid as error:
                refused.append((entry, error))
        self._copying = still
        for entry in copied:
            entry.is_copied = True
        for entry, _ in refused:
            self.clear(entry)
        return copied, refused

    def clear(self, entry: Residence) -> None:
        """The version leaves its slot."""
        assert entry.slot is not None
        self._runner.clear_slot(entry.slot)
        self._free.append(entry.slot)
        del self._entries[entry.ref.digest]
        entry.slot, entry.is_copied, entry.drains_for = None, False, None

    def drain(self, victim: Residence, beneficiary: Residence, now: float) -> None:
        """Admit no more sequences of `victim`, so that `beneficiary` gets its slot."""
        victim.drains_for, victim.drains_since = beneficiary, now
        logger.info("adapter %s drains for %s", victim.ref.id, beneficiary.ref.id)

    def is_draining(self, entry: Residence) -> bool:
        """Whether its sequences must wait. A drain whose beneficiary has a slot or has gone is over."""
        beneficiary = entry.drains_for
        if beneficiary is not None and (beneficiary.slot is not None or beneficiary.num_leases == 0):
            entry.drains_for = None
        return entry.drains_for is not None

    def _copy(self, slot: int, entry: Residence, host: HostAdapter) -> None:
        try:
            self._runner.load_slot(slot, host)
        except DeviceLost:  # not the adapter's fault, and nobody can be served any more
            raise
        except Exception as error:  # one adapter's copy failed; the others' slots are whole
            self._runner.clear_slot(slot)
            self._free.append(slot)
            raise EngineError(f"{entry.ref.id} could not be copied to the device: {error}") from error
        try:
            is_copied = self._runner.slot_ready(slot)
        except AdapterInvalid:
            self._runner.clear_slot(slot)
            self._free.append(slot)
            raise
        entry.slot, entry.is_copied = slot, is_copied
        self._entries[entry.ref.digest] = entry
        if not entry.is_copied:
            self._copying.append(entry)

    def _take(self, entry: Residence, host: HostAdapter) -> int | None:
        if self._is_reserved_for_other(entry):
            return None
        while not (self._free and self._runner.can_load(host)):
            victim = next((other for other in self._entries.values() if self._may_leave(other, entry)), None)
            if victim is None:
                return None
            if self.is_draining(victim):
                # It drained for this version, whose rows may need more than one victim: nobody else may take them.
                self._reserved_for = entry
            self.clear(victim)
        return self._free.pop()

    def _is_reserved_for_other(self, entry: Residence) -> bool:
        holder = self._reserved_for
        if holder is None or holder is entry:
            return False
        if holder.slot is not None or holder.num_leases == 0:
            self._reserved_for = None
            return False
        return True

    def _may_leave(self, entry: Residence, beneficiary: Residence) -> bool:
        if entry.num_running or not entry.is_copied:
            return False
        if self.is_draining(entry):
            return entry.drains_for is beneficiary or self._reserved_for is beneficiary
        return entry.num_leases == 0 and not entry.is_pinned
