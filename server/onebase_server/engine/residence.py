"""One adapter version and where it is: the records that `Residency` keeps and shows."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

from onebase_server.engine.runner import HostAdapter
from onebase_server.engine.types import AdapterRef


class Place(StrEnum):
    """How near to the device a version is."""

    DISK = "disk"
    LOADING = "loading"
    HOST = "host"
    COPYING = "copying"
    SLOT = "slot"


class Want(StrEnum):
    """Answer to a sequence that wants to run."""

    READY = "ready"
    LOADING = "loading"
    NO_SLOT = "no_slot"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Residence:
    """One version and where it is."""

    ref: AdapterRef
    host: HostAdapter | None = None
    is_loading: bool = False
    slot: int | None = None
    is_copied: bool = False
    """The slot may be used."""
    num_leases: int = 0
    """Live sequences, waiting ones included."""
    num_running: int = 0
    """Sequences in the batch: they need the slot."""
    is_pinned: bool = False
    drains_for: "Residence | None" = None
    """Set while no sequence of this version is admitted, so that its slot falls free for the other."""
    drains_since: float = 0.0
    error: Exception | None = None
    failed_at: float = 0.0
    preloads: "list[Future[None]]" = field(default_factory=list)
    unloads: "list[Future[None]]" = field(default_factory=list)
    is_deleted: bool = False
    """Nothing of it stays when it is unloaded."""
    num_hits: int = 0
    """Leases taken while it was in host memory or a slot."""
    num_misses: int = 0
    num_loads: int = 0
    last_used: float | None = None
    """Unix seconds."""
    load_s: float | None = None
    """Disk to host, last time."""

    @property
    def place(self) -> Place:
        if self.slot is not None:
            return Place.SLOT if self.is_copied else Place.COPYING
        if self.host is not None:
            return Place.HOST
        return Place.LOADING if self.is_loading else Place.DISK


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One line of GET /admin/adapters."""

    ref: AdapterRef
    place: Place
    slot: int | None
    leases: int
    running: int
    pinned: bool
    draining: bool
    host_bytes: int
    hits: int
    misses: int
    loads: int
    last_used: float | None
    load_s: float | None
    error: str | None


def status_of(entry: Residence) -> AdapterStatus:
    """The entry as the API shows it."""
    return AdapterStatus(
        ref=entry.ref,
        place=entry.place,
        slot=entry.slot,
        leases=entry.num_leases,
        running=entry.num_running,
        pinned=entry.is_pinned,
        draining=entry.drains_for is not None,
        host_bytes=entry.host.nbytes if entry.host is not None else 0,
        hits=entry.num_hits,
        misses=entry.num_misses,
        loads=entry.num_loads,
        last_used=entry.last_used,
        load_s=entry.load_s,
        error=str(entry.error) if entry.error is not None else None,
    )


def without_frames(error: BaseException) -> None:
    """Let go of what the error's frames held (half a file of weights): it will be remembered for long."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


def resolve(futures: "list[Future[None]]", error: Exception | None = None) -> None:
    """Tell everybody who waits, once: all is well, or `error`."""
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
    futures.clear()
