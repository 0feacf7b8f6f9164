"""Run as a process of its own: fork publishers, kill them at staggered moments, and check the store after each.

python -m store_crasher kill|race ROOT SOURCE. It forks, so it must stay single-threaded; pytest's process may not be.
"""

import os
import signal
import sys
import time
from pathlib import Path

from onebase.adapter import AdapterFiles, digest, validate_adapter
from onebase.store import AdapterStore
from sample_adapters import BASE, SHAPES

KILLS = 20


def check_whole(root: Path) -> int:
    """Everything that the pointer names is there and sound; the number of versions."""
    entry = AdapterStore(root).get("bot")
    if entry is None:
        return 0
    numbers = [version.version for version in entry.versions]
    assert numbers == list(range(1, len(numbers) + 1)), numbers
    assert entry.weights == {numbers[-1]: 1.0}, entry.weights
    for version in entry.versions:
        validate_adapter(AdapterFiles.read(version.path), SHAPES, BASE)
        assert digest(version.path) == version.digest
    return len(numbers)


def fork_publisher(root: Path, source: Path, count: int) -> int:
    """A child that publishes `count` versions and exits 0."""
    pid = os.fork()
    if pid == 0:
        store = AdapterStore(root)
        for _ in range(count):
            store.publish(source, "bot", base=BASE, base_shapes=SHAPES)
        os._exit(0)
    return pid


def kill_at_staggered_moments(root: Path, source: Path) -> None:
    """Moments spread over two publishes' time, as measured first."""
    started = time.perf_counter()
    os.waitpid(fork_publisher(root, source, 4), 0)
    two_publishes = (time.perf_counter() - started) / 2
    seen = check_whole(root)
    for attempt in range(KILLS):
        pid = fork_publisher(root, source, 1_000_000)
        time.sleep(two_publishes * attempt / KILLS)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        count = check_whole(root)
        assert count >= seen, (count, seen)
        seen = count
    print(seen)


def publish_at_once(root: Path, source: Path) -> None:
    pids = [fork_publisher(root, source, 5) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    print(check_whole(root))


if __name__ == "__main__":
    mode, root, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    {"kill": kill_at_staggered_moments, "race": publish_at_once}[mode](root, source)
