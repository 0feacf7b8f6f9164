"""Memory asked for in huge pages holds the same values, and the kernel says that they are huge where it grants them."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from onebase.huge_pages import HUGE_PAGE, prefer_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def test_a_range_without_a_whole_huge_page_is_left_alone() -> None:
    data = np.ones(1000, np.uint8)
    assert not prefer_huge_pages(data.ctypes.data, data.nbytes)


@pytest.mark.parametrize("touched", [False, True])
def test_values_stay_and_pages_become_huge(touched: bool) -> None:
    with mmap.mmap(-1, 4 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = np.frombuffer(memory, np.uint8)
        before = huge_kib() if ENABLED.exists() else 0
        if touched:
            view[:] = np.arange(len(view)) % 251
        granted = prefer_huge_pages(view.ctypes.data, view.nbytes)
        if not touched:
            view[:] = np.arange(len(view)) % 251
        assert (view == np.arange(len(view)) % 251).all()
        if granted and "[never]" not in ENABLED.read_text():
            assert huge_kib() > before
        del view
