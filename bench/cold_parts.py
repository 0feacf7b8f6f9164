"""A cold adapter by parts: what the loader's thread does with the files, and the CPU's own way to a laid-out adapter.

Real PEFT folders at OpenLLaMA-7B's shape (rank 8 on q, k, v), in the page cache, no GPU needed: one JSON line a dtype.
`gpu_cold_adapter.py` takes the same parts on a card. PYTHONPATH=core:server:tests:bench.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

from onebase_server.engine.adapter_plan import Layout
from onebase_server.engine.host_adapter import AdapterReader
from onebase_server.engine.host_memory import HostMemory
from onebase_server.engine.weights import PROJECTIONS

LAYERS, HIDDEN, INNER, RANK = 32, 4096, 11008, 8
LAYOUT = Layout(
    layers=LAYERS,
    modules=PROJECTIONS,
    columns={"qkv": HIDDEN, "o": HIDDEN, "gate_up": HIDDEN, "down": INNER},
    offsets={
        "qkv": (0, HIDDEN, 2 * HIDDEN, 3 * HIDDEN),
        "o": (0, HIDDEN),
        "gate_up": (0, INNER, 2 * INNER),
        "down": (0, HIDDEN),
    },
)
Result = TypeVar("Result")


def write_adapter(folder: Path, dtype: torch.dtype) -> None:
    """As PEFT saves it: random values, rank 8 on q, k, v."""
    tensors = {}
    for layer in range(LAYERS):
        for name in "qkv":
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
            tensors[key + "A.weight"] = (torch.randn(RANK, HIDDEN) * 0.02).to(dtype)
            tensors[key + "B.weight"] = (torch.randn(HIDDEN, RANK) * 0.02).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random",
        "r": RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Parts:
    """Milliseconds by part; the median of each."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    def take(self, name: str, part: Callable[..., Result], *args: object) -> Result:
        begin = time.perf_counter()
        result = part(*args)
        self.note(name, (time.perf_counter() - begin) * 1e3)
        return result

    def note(self, name: str, ms: float) -> None:
        self._taken.setdefault(name, []).append(ms)

    def medians(self) -> dict[str, float]:
        return {f"{name}_ms": round(statistics.median(taken), 3) for name, taken in self._taken.items()}


def host_parts(folders: list[Path], memory: HostMemory, chunk_bytes: int) -> Parts:
    """`check_first`: config, header, checks and plan of the first adapter of a recipe, `check` of the others, `read`:
    that and the file into the arena; `laid_out`: a CPU's whole way."""
    parts = Parts()
    kept = AdapterReader(LAYOUT, None, 64, chunk_bytes=chunk_bytes)
    cpu = AdapterReader(LAYOUT, None, 64, longest_run=1)
    kept.read_packed(folders[0], memory)
    cpu.check(folders[0])
    for number, folder in enumerate(folders):
        set_alpha(folder, 100 + number)
        parts.take("check_first", kept.check, folder)
        parts.take("check", kept.check, folder)
        parts.take("read", kept.read_packed, folder, memory)
        parts.take("laid_out", cpu.read_laid_out, folder, torch.bfloat16)
    return parts


def set_alpha(folder: Path, alpha: int) -> None:
    """Another recipe, for which no plan is kept yet."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))


def main() -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as root:
            folders = [Path(root, f"a{i}") for i in range(10)]
            for folder in folders:
                write_adapter(folder, dtype)
            memory = HostMemory(256 << 20, pin=False)
            memory.block(128 << 20).tensor.zero_()  # pinned memory has been touched, too
            parts = host_parts(folders, memory, chunk_bytes=32 << 20).medians()
            print(json.dumps({"what": "cold adapter, host parts", "files": str(dtype), **parts}), flush=True)


if __name__ == "__main__":
    main()
