"""What every line of the GPU benchmarks says of the machine: its name, what it reads from memory, versions."""

import importlib.metadata
from functools import cache
from typing import Any

import torch

_BYTES = 2 << 30


@cache
def read_tbps() -> float:
    """TB/s that this card reads, measured: a sum over 2 GiB, the best of twenty."""
    values = torch.ones(_BYTES // 4, device="cuda")
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        values.sum()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return round(_BYTES / min(times) / 1e9, 3)


def _own_version() -> str:
    try:
        return importlib.metadata.version("onebase")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout by its PYTHONPATH
        return "checkout"


def machine() -> dict[str, Any]:
    """`gpu`, `read_tbps` and `versions` of a line."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "read_tbps": read_tbps(),
        "versions": {
            "onebase": _own_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    }
