"""Where adapter versions are: disk -> host memory -> device slot, and who holds them there.

Everything is keyed by digest. All methods run on the engine thread; only reading files happens elsewhere, one flight
a version, and comes back as a call of `on_loaded`. A lease (a live sequence) keeps a version wanted; a running
sequence keeps it in its slot. Who leaves for whom: host_cache.py, slots.py.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future

from onebase.errors import AdapterInvalid, Conflict, EngineError
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.host_cache import HostCache
from onebase_server.engine.residence import AdapterStatus, Place, Residence, Want, resolve, status_of, without_frames
from onebase_server.engine.runner import DeviceLost, HostAdapter, Runner
from onebase_server.engine.slots import DeviceSlots
from onebase_server.engine.types import AdapterRef

logger = logging.getLogger(__name__)


Loaded = Callable[[Residence, HostAdapter | None, Exception | None, float], None]


class Residency:
    """All versions that the engine has heard of. `post_loaded` carries a finished read to the engine thread."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        executor: Executor,
        post_loaded: Loaded,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._config = config
        self._executor = executor
        self._post_loaded = post_loaded
        self._clock = clock
        self._known: OrderedDict[str, Residence] = OrderedDict()  # least recently used first
        self.hosts = HostCache(config)
        self.slots = DeviceSlots(runner)
        self._failed: list[tuple[Residence, Exception]] = []

    # Leases

    def lease(self, ref: AdapterRef, count: int) -> Residence:
        """Hold a version for `count` sequences and start to bring it near."""
        entry = self._entry(ref)
        entry.num_leases += count
        entry.last_used = time.time()
        if entry.host is not None or entry.slot is not None:
            entry.num_hits += 1
        else:
            entry.num_misses += 1
        self._touch(entry)
        if self.hosts.has_room():
            self._start_load(entry)
        return entry

    def release(self, entry: Residence) -> None:
        """One sequence less. The last one lets go what was told to unload."""
        entry.num_leases -= 1
        assert entry.num_leases >= entry.num_running >= 0
        if entry.num_leases == 0:
            self._drop_if_told(entry)
            self.hosts.trim()

    def enter(self, entry: Residence) -> int:
        """A sequence starts to run on the version's slot."""
        assert entry.slot is not None
        assert entry.is_copied
        entry.num_running += 1
        self._touch(entry)
        return entry.slot

    def leave(self, entry: Residence) -> None:
        """A sequence stops running (finished or preempted)."""
        entry.num_running -= 1
        assert entry.num_running >= 0

    # Coming nearer

    def want(self, entry: Residence) -> Want:
        """Take the next step towards the slot; READY when a sequence may run."""
        if entry.slot is not None:
            return Want.READY if entry.is_copied else Want.LOADING
        if entry.host is None:
            if self.hosts.may_read(entry):
                self._start_load(entry)
            return Want.FAILED if entry.error is not None and not entry.is_loading else Want.LOADING
        try:
            has_place = self.slots.place(entry)
        except (EngineError, AdapterInvalid) as error:
            self._fail(entry, error)
            return Want.FAILED
        if not has_place:
            return Want.NO_SLOT
        if entry.is_copied:
            self.hosts.trim()
        return Want.READY if entry.is_copied else Want.LOADING

    def poll(self) -> bool:
        """Whether a copy to a slot has finished since the last call, one way or the other."""
        copied, refused = self.slots.poll()
        for entry in copied:
            resolve(entry.preloads)
            self._drop_if_told(entry)
        for entry, error in refused:
            self._fail(entry, error)
        if copied:
            self.hosts.trim()
        return bool(copied or refused)

    def on_loaded(self, entry: Residence, host: HostAdapter | None, error: Exception | None, seconds: float) -> None:
        """A read has finished, one way or the other."""
        entry.is_loading = False
        self.hosts.num_loading -= 1
        if host is None:
            assert error is not None
            self._fail(entry, error)
            return
        entry.error, entry.load_s = None, seconds
        entry.num_loads += 1
        self.hosts.add(entry, host)
        logger.info("adapter %s read in %.1f ms (%d bytes)", entry.ref.id, seconds * 1e3, host.nbytes)
        if entry.unloads and entry.num_leases == 0:
            resolve(entry.preloads)
            self._drop_if_told(entry)
            return
        try:
            self.slots.place_if_free(entry)
        except (EngineError, AdapterInvalid) as copy_error:
            self._fail(entry, copy_error)
            return
        if entry.place is not Place.COPYING:  # else its values may yet turn out to be bad
            resolve(entry.preloads)
        self.hosts.trim()

    def take_failed(self) -> list[tuple[Residence, Exception]]:
        """Versions that failed to load since the last call: their waiting sequences must fail."""
        failed, self._failed = self._failed, []
        return failed

    # Orders

    def preload(self, ref: AdapterRef, done: "Future[None]", *, pin: bool = False) -> None:
        """Bring a version to host memory, and to a slot if one is free. `done` fails if it can't be loaded."""
        entry = self._entry(ref)
        if pin and not entry.is_pinned:
            pinned = sum(1 for other in self._known.values() if other.is_pinned)
            if pinned + 1 >= max(2, self._runner.limits.num_slots):
                done.set_exception(Conflict(f"{pinned} adapters are pinned; at least one slot must stay free to swap"))
                return
            entry.is_pinned = True
        if entry.place is Place.COPYING:
            entry.preloads.append(done)
            return
        if entry.host is not None or entry.slot is not None:
            done.set_result(None)
            return
        entry.preloads.append(done)
        entry.error = None
        self._start_load(entry)

    def unpin(self, ref: AdapterRef, done: "Future[None]") -> None:
        """It may leave memory again when others need the room."""
        self._entry(ref).is_pinned = False
        self.hosts.trim()
        done.set_result(None)

    def unload(self, ref: AdapterRef, done: "Future[None]", *, forget: bool = False) -> None:
        """Free the version's memory once its last lease ends; `done` then. `forget`: its counters with it."""
        entry = self._known.get(ref.digest)
        if entry is None:
            done.set_result(None)
            return
        entry.is_pinned = False
        entry.is_deleted |= forget
        entry.unloads.append(done)
        self._drop_if_told(entry)

    def status(self) -> list[AdapterStatus]:
        return [status_of(entry) for entry in self._known.values()]

    def place_of(self, digest: str) -> Place:
        """From any thread: one look-up, and fields that are each whole."""
        entry = self._known.get(digest)
        return Place.DISK if entry is None else entry.place

    def abort(self, error: Exception) -> None:
        """The engine ends: nobody waits for a load or an unload any more."""
        for entry in self._known.values():
            resolve(entry.preloads, error)
            resolve(entry.unloads, error)

    # Inside

    def _entry(self, ref: AdapterRef) -> Residence:
        entry = self._known.get(ref.digest)
        if entry is None:
            entry = self._known[ref.digest] = Residence(ref)
            if len(self._known) > self._config.max_known_adapters:
                self._forget_one()
        return entry

    def _forget_one(self) -> None:
        for digest, entry in self._known.items():
            if entry.place is Place.DISK and not entry.num_leases and not entry.is_pinned and not entry.preloads:
                del self._known[digest]
                return

    def _touch(self, entry: Residence) -> None:
        self._known.move_to_end(entry.ref.digest)
        self.hosts.touch(entry)
        self.slots.touch(entry)

    def _start_load(self, entry: Residence) -> None:
        if entry.is_loading or entry.host is not None or entry.slot is not None:
            return
        if entry.error is not None:
            if self._clock() - entry.failed_at < self._config.failed_load_ttl_s:
                self._failed.append((entry, entry.error))
                return
            entry.error = None
        entry.is_loading = True
        self.hosts.num_loading += 1
        self._executor.submit(self._read, entry)

    def _read(self, entry: Residence) -> None:
        """On a loader thread."""
        begin = time.perf_counter()
        try:
            host = self._runner.read_adapter(entry.ref)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the requests that wait for it
            self._post_loaded(entry, None, error, time.perf_counter() - begin)
        else:
            self._post_loaded(entry, host, None, time.perf_counter() - begin)

    def _fail(self, entry: Residence, error: Exception) -> None:
        if isinstance(error, DeviceLost):  # the engine's end, and no mark on the version
            raise error
        logger.warning("adapter %s can't be served: %s", entry.ref.id, error)
        without_frames(error)
        if isinstance(error, AdapterInvalid):
            self.hosts.drop(entry)
        entry.error, entry.failed_at = error, self._clock()
        self._failed.append((entry, error))
        resolve(entry.preloads, error)
        self._drop_if_told(entry)

    def _drop_if_told(self, entry: Residence) -> None:
        """Free all memory of a version that was told to unload, once nobody holds or moves it."""
        if not entry.unloads or entry.num_leases or entry.is_loading or entry.place is Place.COPYING:
            return
        if entry.slot is not None:
            self.slots.clear(entry)
        self.hosts.drop(entry)
        resolve(entry.unloads)
        if entry.is_deleted:
            del self._known[entry.ref.digest]
