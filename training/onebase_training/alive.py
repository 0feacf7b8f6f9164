"""Signs of life during work that has no place of its own to give them: loading a base, writing a checkpoint.

What is long and made of many parts (layers, rows, tensors) calls `StatusWriter.alive` itself. The rest is watched from
beside: a thread speaks for the process only while that computes, reads or writes, so one that hangs falls silent.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

MOVED_S = 0.01
"""Seconds of CPU between two looks that count as work; the looking itself takes less."""


@contextmanager
def while_working(sign: Callable[[], None], every_s: float = 5.0) -> Iterator[None]:
    """Call `sign` every few seconds for as long as the block lasts and the process does something."""
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(sign, every_s, done), name="signs of life", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def _watch(sign: Callable[[], None], every_s: float, done: threading.Event) -> None:
    before = _work_done()
    while not done.wait(every_s):
        now = _work_done()
        if now[0] - before[0] > MOVED_S or now[1:] != before[1:]:
            sign()
        before = now


def _work_done() -> tuple[float, int, int]:
    """Seconds of CPU, and what was read and written on disks where the system counts it."""
    try:
        counted = psutil.Process().io_counters()
    except (psutil.Error, AttributeError, OSError):  # macOS has no such count
        return time.process_time(), 0, 0
    return time.process_time(), counted.read_bytes, counted.write_bytes
