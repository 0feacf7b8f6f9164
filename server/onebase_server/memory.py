"""How much memory this process may still take: the machine's, or what is left of its container's limit; its collector;
what is freed and goes back to the kernel.

psutil shows the machine's however small the container is, and who sizes by that is killed by the kernel.
"""

import ctypes
import gc
import threading
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
TRIM_S = 10.0
HEAPS = 2
_M_ARENA_MAX = -8
"""glibc's malloc.h."""
NO_LIMIT = 1 << 60
"""The old interface writes a number near 2**63 for none."""


def keep_what_stands() -> None:
    """Once all is loaded: the collector need not look at it again.

    It takes in the oldest garbage only when that is a quarter of all that lives, and a server that has just started
    holds some 400,000 objects: tens of thousands of dead ones lay about, the heap's peak crept up with them, and each
    look through everything held up the answers. Process-wide, so for whoever owns the process to call.
    """
    gc.collect()
    gc.freeze()


def share_heaps() -> bool:
    """Let all threads allocate from `HEAPS` heaps; whether the C library could be told. Call it before threads start.

    glibc gives each thread a heap of its own, up to eight a core, and what one thread frees there no other thread may
    have: a server of some thirty threads grew for hours by pieces that nobody used. Ours allocate little at a time, so
    they seldom wait for each other. Process-wide, so for whoever owns the process to call.
    """
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, HEAPS))
    return False


def give_back_free() -> None:
    """Return to the kernel what the C library keeps of freed memory between pieces in use. Does nothing where it is not
    glibc. Takes less than a millisecond; without it the holes creep up under mixed load for hours.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_giving_back(over: threading.Event) -> None:
    """Every `TRIM_S`, in a thread of its own, until `over`."""

    def work() -> None:
        while not over.wait(TRIM_S):
            give_back_free()

    threading.Thread(target=work, name="onebase-trim", daemon=True).start()


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes."""
    free = int(psutil.virtual_memory().available)
    left = container_memory_left(cgroup)
    return free if left is None else min(free, left)


def container_memory_left(cgroup: Path = CGROUP) -> int | None:
    """Bytes to the limit of the container, file cache that can be dropped counted as free; None if it has no limit."""
    for folder, limit, used, cache in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
            if most < NO_LIMIT:
                return max(0, most - taken + _statistic(folder / "memory.stat", cache))
    return None


def _statistic(path: Path, name: str) -> int:
    """0 if it is not there."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0
