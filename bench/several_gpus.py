"""Training speed on one and on several GPUs of a machine, started as docs/training.md says. One JSON line a number.

    PYTHONPATH=core:training:tests python bench/several_gpus.py BASE [--gpus 1 2] [--out FILE]

BASE is a base folder (bench/random_base.py). Steps of --rows conversations of some --words words each, r = 16 on all
linear layers, the whole program with checkpoints off; tokens/s from the fourth step to the last but one, and the most
memory that nvidia-smi showed on any GPU.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from onebase.home import Home

FIRST = 4


def conversations(path: Path, count: int, words: int) -> Path:
    rng = random.Random(0)
    vocabulary = ("ship", "harbour", "rain", "bread", "lantern", "winter", "glass", "road", "music", "stars")

    def text(length: int) -> str:
        return " ".join(rng.choice(vocabulary) for _ in range(length))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = rng.randint(words // 2, words * 3 // 2)
            turns = [
                {"role": "user", "content": text(length // 2)},
                {"role": "assistant", "content": text(length // 2)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def most_memory_mib() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return max(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def measure(gpus: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    folder = scratch / f"gpus-{gpus}"
    folder.mkdir()
    steps, status = options.steps, folder / "status.json"
    data = conversations(folder / "data.jsonl", options.rows * 4, options.words)
    content = {
        "name": f"gpus-{gpus}",
        "base": str(options.base),
        "data": {"train": str(data), "eval_fraction": 0},
        "lora": {"r": 16, "alpha": 32},
        "train": {"max_steps": steps, "batch_size": options.rows, "save_every": "never", "schedule": "constant"},
        "compute": {"device": "cuda"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), "utf-8")
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(gpus), *(["--multi_gpu"] * (gpus > 1))]
    command = [sys.executable, *(launch if gpus > 1 else []), "-m", "onebase_training", str(folder / "recipe.yaml")]
    command += ["--home", str(scratch / "home"), "--run-dir", str(folder / "run"), "--status", str(status)]
    log = (folder / "log").open("wb")
    child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ})
    seen: dict[int, tuple[float, int]] = {}
    memory = 0
    while child.poll() is None:
        told = json.loads(status.read_text("utf-8")) if status.exists() else {"step": 0}
        if told["step"] and told["step"] not in seen:
            seen[told["step"]] = told["updated_at"], told["trained_tokens"]
            memory = max(memory, most_memory_mib())
        time.sleep(0.02)
    if child.returncode:
        raise SystemExit((folder / "log").read_text("utf-8"))
    begin, end = (step for step in (min(s for s in seen if s >= FIRST), max(s for s in seen if s < steps)))
    seconds, tokens = (b - a for a, b in zip(seen[begin], seen[end], strict=True))
    return {
        "gpus": gpus,
        "trained_tokens_per_s": round(tokens / seconds, 1),
        "s_per_step": round(seconds / (end - begin), 3),
        "steps_timed": end - begin,
        "most_memory_mib": memory,
        "loss": json.loads(status.read_text("utf-8"))["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as scratch:
        Home(Path(scratch) / "home").create()
        for gpus in options.gpus:
            set_up = {"gpu": torch.cuda.get_device_name(), "rows": options.rows, "words": options.words}
            line = {**set_up, "base": options.base.name, **measure(gpus, options, Path(scratch))}
            print(json.dumps(line), flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
