"""Publishes new versions of one adapter, for a load test to run beside: `hot_swap.py HOME NAME TIMES`.

Each version has other weights: the same content would have the same identity, and nothing would be loaded.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file, save_file

from onebase.home import Home
from onebase.store import AdapterStore


def main(home: Path, name: str, times: int, pause_s: float = 1.0) -> None:
    store = AdapterStore(Home(home).adapters)
    for _ in range(times):
        time.sleep(pause_s)
        current = store.resolve(name)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            shutil.copytree(current.path, folder, ignore=shutil.ignore_patterns("onebase.json"))
            weights = load_file(folder / "adapter_model.safetensors")
            save_file({key: tensor * 0.99 for key, tensor in weights.items()}, folder / "adapter_model.safetensors")
            store.publish(folder, name, base=current.manifest.base, same_base=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
