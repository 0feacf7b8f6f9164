"""What a container may take is what its limit leaves; what a server has loaded is no work for the collector."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from live_server import live_server
from onebase_server.memory import HEAPS, container_memory_left, free_memory, give_back_free


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)
    return folder


@pytest.mark.parametrize("stat", ["anon 5\ninactive_file 300\nactive_file 7\n", "anon 5\n", None])
def test_the_limit_of_a_container_counts(tmp_path: Path, stat: str | None) -> None:
    files = {"max": "2000\n", "current": "1500\n"} | ({"stat": stat} if stat else {})
    write(tmp_path, **files)
    assert container_memory_left(tmp_path) == (800 if stat and "inactive" in stat else 500)
    assert free_memory(tmp_path) == container_memory_left(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_between_pieces_in_use_goes_back_to_the_kernel() -> None:
    pieces = [b"x" * 4000 + bytes([number % 256]) for number in range(20_000)]
    kept = pieces[::50]
    full = psutil.Process().memory_info().rss
    pieces.clear()
    give_back_free()
    assert psutil.Process().memory_info().rss < full - 40_000_000
    assert len(kept) == 400


ALLOCATE_IN_THREADS = """
import ctypes, threading
from onebase_server.memory import share_heaps
if {shared}: assert share_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(16)
def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.malloc_stats()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_two_heaps(shared: bool) -> None:
    code = ALLOCATE_IN_THREADS.format(shared=shared)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heaps = len(re.findall(r"^Arena \d+:", done.stderr, re.MULTILINE))
    assert (heaps <= HEAPS) is shared, done.stderr


def test_the_old_interface_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "memory", limit_in_bytes="2000", usage_in_bytes="1500", stat="total_inactive_file 100\n")
    assert container_memory_left(tmp_path) == 600


@pytest.mark.parametrize("limit", ["max", str((1 << 63) - 4096), None])
def test_without_a_limit_the_machines_memory_counts(tmp_path: Path, limit: str | None) -> None:
    if limit is not None:
        write(tmp_path, max=limit, current="1500")
    assert container_memory_left(tmp_path) is None
    assert 0 < free_memory(tmp_path) <= psutil.virtual_memory().total


def test_a_container_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    write(tmp_path, max="1000", current="1500")
    assert container_memory_left(tmp_path) == 0


@pytest.mark.slow
def test_the_collector_leaves_alone_what_stands_when_a_server_is_ready(tmp_path: Path) -> None:
    frozen = gc.get_freeze_count()
    with live_server(tmp_path):
        assert gc.get_freeze_count() > frozen
