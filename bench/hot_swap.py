"""Publishes new versions of one adapter again and again, for a load test to run beside: `hot_swap.py HOME NAME TIMES`."""

import sys
import time
from pathlib import Path

from onebase.home import Home
from onebase.store import AdapterStore


def main(home: Path, name: str, times: int, pause_s: float = 1.0) -> None:
    store = AdapterStore(Home(home).adapters)
    for _ in range(times):
        time.sleep(pause_s)
        current = store.resolve(name)
        store.publish(current.path, name, base=current.manifest.base, same_base=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
