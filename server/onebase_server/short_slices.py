"""The event loop's thread runs for microseconds at a time, beside compute threads that fill every core for a step.

Linux (EEVDF) lets a woken thread wait until the running one has used its slice, some 3 ms; one with a shorter slice of
its own goes first. It gets no more of the processor for that. Since Linux 6.12; elsewhere nothing changes.
"""

import ctypes
import os
import platform
import struct
import sys

SLICE_NS = 100_000
"""The kernel's least."""
_SETATTR = {"x86_64": 314, "aarch64": 274}
_RESET_ON_FORK = 1  # threads and processes begun from here have the usual slice


def take_short_slices() -> bool:
    """For the calling thread. Whether the kernel took it (an older one takes it and does nothing)."""
    number = _SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # struct sched_attr of sched_setattr(2): size, policy, flags, nice, priority, runtime, deadline, period, util x 2
    attributes = struct.pack("IIQiIQQQII", 56, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, SLICE_NS, 0, 0, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, attributes, 0) == 0)
