"""One base for a server and a training job: what each costs the other, and what memory holds.

    python bench/train_while_serving.py [--seconds 20] [--policy serve-first 0.7 ...] [--device cpu] [--note ...]

Answers are 32 to 96 tokens long, so that the streams do not run in step: else the p99 of the server alone is
that of steps in which nobody begins, and any disturbance that parts the streams looks like a slow-down.

Trains alone; serves alone (16 streams, then a third of the request rate that they reached); then both at once, in the
same three loads (idle, 16 streams, a third), for each policy. Appends one JSON line a policy to --out. The job is
started as the server starts its own: same command, same priority. About six times --seconds on two CPU cores, and four
times more for each policy.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from onebase.base_fetch import find_base
from onebase.bases import EMBEDDED_ID, BaseSpec
from onebase.home import Home, default_home
from onebase_server.jobs.process import RunCommand, RunProcess
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.loadtest.drive import Target, drive
from onebase_server.loadtest.report import summarize
from onebase_server.loadtest.workload import Workload

ROOT = Path(__file__).parents[1]
STREAMS = 16


class Bench:
    def __init__(self, options: argparse.Namespace, spec: BaseSpec, home: Home) -> None:
        self.options, self.spec, self.home = options, spec, home
        self.env = {**os.environ, "ONEBASE_HOME": str(home.root), "ONEBASE_BASE": str(spec.path)}
        self.env |= {"ONEBASE_PORT": "0", "ONEBASE_DEVICE": options.device}

    # Processes

    @contextmanager
    def server(self) -> Iterator[tuple[str, int]]:
        """URL and pid of a server that is ready."""
        log = self.home.root / "server.log"
        with log.open("wb") as stream:
            child = subprocess.Popen([sys.executable, "-m", "onebase_server"], env=self.env, stderr=stream)
        try:
            while "ready:" not in log.read_text("utf-8"):
                if child.poll() is not None:
                    raise SystemExit(log.read_text("utf-8"))
                time.sleep(0.1)
            found = re.search(r"listening at (\S+?);", log.read_text("utf-8"))
            assert found is not None
            yield found[1], child.pid
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()

    @contextmanager
    def trainer(self, name: str, **env: str) -> Iterator["Trainer"]:
        """A job that never ends, past its first steps (`--warm-steps`: kernels are built, each shape was seen)."""
        folder = RunFolder(self.home.runs, name)
        folder.create()
        recipe = {
            "name": name,
            "base": str(self.spec.path),
            "data": {"train": str(ROOT / "training/data/captain.jsonl"), "eval_fraction": 0},
            "lora": {"r": 8, "alpha": 16},
            "train": {"max_steps": 1_000_000, "batch_size": 4, "save_every": "never", "schedule": "constant"},
            "compute": {"device": self.options.device},
        }
        folder.recipe.write_text(yaml.safe_dump(recipe), "utf-8")
        arguments = ["train", str(folder.recipe), "--home", str(self.home.root), "--status", str(folder.status)]
        process = RunCommand(env=self.env | env).start([*arguments, "--run-dir", str(folder.work)], folder)
        assert process is not None
        trainer = Trainer(process, folder)
        try:
            while folder.read_status().step < self.options.warm_steps:
                if not process.is_alive():
                    raise SystemExit(folder.log.read_text("utf-8"))
                time.sleep(0.2)
            yield trainer
        finally:
            process.kill()
            while process.is_alive():
                time.sleep(0.05)

    # Loads

    def streams(self, url: str, requests: int, rate: float | None = None) -> dict[str, Any]:
        workload = Workload(
            models=(self.spec.id,),
            requests=requests,
            concurrency=STREAMS if rate is None else None,
            rate=rate,
            prompt_tokens=64,
            output_tokens=64,
            output_spread=0.5,
        )
        target = Target(f"{url}/v1", extra_body={"ignore_eos": True})
        results, wall_s = asyncio.run(drive(target, workload))
        seen = summarize(results, wall_s, workload)
        if seen["errors"]:
            raise SystemExit(f"{seen['errors']} requests failed: {seen['first_error']}")
        return seen

    def run(self) -> Iterator[dict[str, Any]]:
        """A record for each policy; what each side does alone is measured once."""
        seconds = self.options.seconds
        record: dict[str, Any] = {}
        with self.trainer("solo") as trainer:
            record["trainer_solo"] = trainer.speed_during(lambda: time.sleep(seconds))
            record["trainer_solo"]["memory_mb"] = memory_mb(trainer.pid)
        with self.server() as (url, pid):
            self.streams(url, 2 * STREAMS)  # warm-up
            rate = self.streams(url, 3 * STREAMS)["requests_per_s"]
            count = max(2 * STREAMS, round(rate * seconds))
            full = self.streams(url, count)
            third = full["requests_per_s"] / 3
            count_third = max(4, round(third * seconds))
            record["server_alone"] = {
                "16_streams": brief(full),
                "third": brief(self.streams(url, count_third, third)),
                "memory_mb": memory_mb(pid),
            }
            for policy in self.options.policy:
                env = {"ONEBASE_TRAIN_POLICY": policy} | dict(each.split("=", 1) for each in self.options.trainer_env)
                with self.trainer(f"beside-{policy}", **env) as trainer:
                    record["both"] = {
                        "idle": {"trainer": trainer.speed_during(lambda: time.sleep(seconds))},
                        "16_streams": self.both(trainer, url, count),
                        "third": self.both(trainer, url, count_third, third),
                        "trainer_memory_mb": memory_mb(trainer.pid),
                        "server_memory_mb": memory_mb(pid),
                        "trainer_says": next((line for line in trainer.log() if "MB" in line), ""),
                    }
                    if self.options.device != "cpu":
                        record["both"]["nvidia_smi"] = nvidia_smi()
                yield {"policy": policy} | record | {"ratios": ratios(record)}

    def both(self, trainer: "Trainer", url: str, count: int, rate: float | None = None) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        speed = trainer.speed_during(lambda: seen.update(brief(self.streams(url, count, rate))))
        return {"server": seen, "trainer": speed}


class Trainer:
    def __init__(self, process: RunProcess, folder: RunFolder) -> None:
        self._folder = folder
        self.pid = int(json.loads(folder.status.read_text("utf-8"))["pid"]) if folder.status.exists() else 0
        self.process = process

    def log(self) -> list[str]:
        return self._folder.log.read_text("utf-8").splitlines()

    def speed_during(self, load: Any) -> dict[str, Any]:
        """Tokens a second between the steps that began after the load did and ended before it."""
        self.pid = int(self._status()["pid"])
        begin = self._next_step()
        load()
        end = self._status()
        if end["trained_tokens"] == begin["trained_tokens"]:  # not one step meanwhile: to the end of the one under way
            end = self._next_step()
        tokens, seconds = end["trained_tokens"] - begin["trained_tokens"], end["updated_at"] - begin["updated_at"]
        return {"tokens_per_s": round(tokens / seconds, 1), "steps": end["step"] - begin["step"]}

    def _next_step(self) -> dict[str, Any]:
        before = self._status()["step"]
        while self._status()["step"] == before:
            time.sleep(0.02)
        return self._status()

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self._folder.status.read_text("utf-8"))
        return status


def brief(seen: dict[str, Any]) -> dict[str, Any]:
    kept = ("requests", "wall_s", "requests_per_s", "output_tokens_per_s", "ttft_ms", "inter_token_ms")
    return {key: seen[key] for key in kept}


def memory_mb(pid: int) -> dict[str, float]:
    """From /proc: proportional and shared memory of the process, and of the shared base's file in it."""
    rollup = fields(Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8"))
    base: dict[str, float] = {}
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text("utf-8")):
        if "shared-base-" in block:
            for name, value in fields(block).items():
                base[name] = base.get(name, 0) + value
    wanted = ("Rss", "Pss", "Shared_Clean", "Private_Dirty")
    return {key: round(rollup.get(key, 0), 1) for key in wanted} | {
        f"base_{key}": round(base[key], 1) for key in wanted if base
    }


def fields(text: str) -> dict[str, float]:
    return {name: int(value) / 1024 for name, value in re.findall(r"(?m)^(\w+):\s+(\d+) kB", text)}


def nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def ratios(record: dict[str, Any]) -> dict[str, float]:
    """What the issue asks for: at most 1.5 and at least 0.7."""
    alone, both = record["server_alone"], record["both"]
    solo = record["trainer_solo"]["tokens_per_s"]

    def p99(seen: dict[str, Any]) -> float:
        return float(seen["inter_token_ms"]["p99"])

    return {
        "p99_inter_token_16_streams": round(p99(both["16_streams"]["server"]) / p99(alone["16_streams"]), 2),
        "p99_inter_token_third": round(p99(both["third"]["server"]) / p99(alone["third"]), 2),
        "trainer_idle_server": round(both["idle"]["trainer"]["tokens_per_s"] / solo, 2),
        "trainer_16_streams": round(both["16_streams"]["trainer"]["tokens_per_s"] / solo, 2),
        "trainer_third": round(both["third"]["trainer"]["tokens_per_s"] / solo, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=EMBEDDED_ID)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--policy", default=["serve-first"], nargs="+", help="one or more")
    parser.add_argument("--trainer-env", nargs="*", default=[], help="NAME=VALUE for the trainer beside the server")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--warm-steps", type=int, default=3, help="of a trainer before it is timed; an epoch has 28")
    parser.add_argument("--home", type=Path, default=default_home(os.environ), help="where the base is")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/train_while_serving.jsonl")
    options = parser.parse_args()
    spec = find_base(Home(options.home).create(), options.base)
    head = {
        "note": options.note,
        "when": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "device": options.device,
        "base": spec.id,
        "trainer_env": options.trainer_env,
        "seconds": options.seconds,
        "warm_steps": options.warm_steps,
        "output_spread": 0.5,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as scratch:
        for record in Bench(options, spec, Home(Path(scratch) / "home").create()).run():
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(head | record) + "\n")
            print(json.dumps(head | record, indent=1), flush=True)


if __name__ == "__main__":
    main()
