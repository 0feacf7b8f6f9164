"""The event loop's slice is the kernel's least where it has such slices, and what it starts has the usual one."""

import ctypes
import platform
import struct
import threading

import pytest

from onebase_server.short_slices import SLICE_NS, take_short_slices

LAYOUT = "IIQiIQQQII"


def own_slice() -> int:
    """Nanoseconds, of the calling thread; 0 on a kernel without slices of one's own."""
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    buffer = ctypes.create_string_buffer(struct.calcsize(LAYOUT))
    assert ctypes.CDLL(None).syscall(number, 0, buffer, len(buffer), 0) == 0
    return int(struct.unpack(LAYOUT, buffer.raw)[5])


def in_thread(found: list[int]) -> None:
    usual = own_slice()
    taken = take_short_slices()
    child = threading.Thread(target=lambda: found.append(own_slice()))
    child.start()
    child.join()
    found += [usual, own_slice(), taken]


@pytest.mark.skipif(platform.system() != "Linux", reason="Linux's own call")
def test_a_thread_takes_short_slices_and_its_children_do_not() -> None:
    found: list[int] = []
    thread = threading.Thread(target=in_thread, args=(found,))
    thread.start()
    thread.join()
    of_child, before, after, taken = found
    assert of_child == before
    if before:  # an older kernel says 0
        assert taken
        assert after == SLICE_NS < before
