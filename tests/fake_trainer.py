"""A scripted training process: it keeps to the trainer's command line, status file, metrics file and signals.

    python fake_trainer.py PLAN.json train RECIPE --home H --status S --run-dir D --resume --alias A --no-make-current
    python fake_trainer.py PLAN.json evaluate RECIPE --home H --status S --no-base --adapter NAME@N ... --out FILE

The plan (all optional): `steps`, `step_s`, `every` (steps a checkpoint), `ends` (how each attempt ends: "succeed",
"fail", "give up", "server gone", "crash", "crash early", "hang"; the last repeats), `holds` (the step after which it
waits until the file `go` lies beside the plan, 0: before the first; so a test meets it in its middle, however slow the
machine is), `deaf` (signals do nothing), `save_s` (of the checkpoint that a signal asks for; the file `saving` tells
that it is begun); `loss` and `stop_rate` by version for `evaluate`, which waits for the file `measure` if
`evaluate_holds`. Steps already done, as its newest checkpoint says, are not done again. Each start adds a line to the
file `starts`.
"""

import argparse
import json
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

RESUME_EXIT = 75
under_way = {"step": 0, "stopping": 0}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "evaluate"])
    parser.add_argument("recipe", type=Path)
    for name in ("home", "status", "run-dir", "out"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("alias", "max-examples"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--adapter", action="append")
    parser.add_argument("--no-base", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-make-current", action="store_true")
    given = parser.parse_args(sys.argv[2:])
    with Path("starts").open("a") as starts:
        starts.write(f"{given.what} {os.getpid()}\n")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if plan.get("deaf") else lambda *_: stop(given, plan))
    (evaluate if given.what == "evaluate" else train)(given, plan)


def wait_for(name: str) -> None:
    """For ever, but not longer than the test's process lives."""
    parent = os.getppid()
    while not Path(sys.argv[1]).with_name(name).exists():
        if os.getppid() != parent:
            sys.exit("nobody is left to let it go")
        time.sleep(0.005)


def cancel(status: Path) -> None:
    tell(status, state="cancelled")
    os._exit(1)


def stop(given: Any, plan: dict[str, Any]) -> None:
    """Saves first; asked again meanwhile it ends at once."""
    if under_way["stopping"]:
        cancel(given.status)
    under_way["stopping"] = 1
    Path("saving").touch()
    time.sleep(plan.get("save_s", 0.0))
    if given.what == "train" and under_way["step"]:
        checkpoint(given.run_dir, under_way["step"])
    cancel(given.status)


def train(given: Any, plan: dict[str, Any]) -> None:
    total, every = plan.get("steps", 4), plan.get("every", 2)
    done = max((int(path.name.rpartition("-")[2]) for path in given.run_dir.glob("checkpoint-*")), default=0)
    attempt = Path("starts").read_text().count("train ")
    ends = plan.get("ends", ["succeed"])
    end = ends[min(attempt, len(ends)) - 1]
    if plan.get("holds") == 0:
        wait_for("go")
    for step in range(done + 1, total + 1):
        time.sleep(plan.get("step_s", 0.0))
        under_way["step"] = step
        loss = round(2.0 / step, 4)
        with given.status.with_name(given.status.name + ".events.jsonl").open("a") as events:
            values = {"train_loss": loss, "train_mean_token_accuracy": 1 - loss / 4}
            events.write(json.dumps({"type": "metrics", "step": step, "total_steps": total, **values}) + "\n")
        tell(given.status, state="running", step=step, total_steps=total, loss=loss, eta_s=float(total - step))
        if step % every == 0:
            checkpoint(given.run_dir, step)
        if plan.get("holds") == step:
            wait_for("go")
        if end == "give up":
            print("Traceback: out of luck", flush=True)
            sys.exit(3)
        if end == "server gone" and step == max(done + 1, total // 2):
            sys.exit(RESUME_EXIT)
        if end == "crash early" and step > done:  # after each one's first step
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "crash" and step == total // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while end == "hang" and step == total // 2:
            time.sleep(60)
    if end == "fail":
        error = {"code": "training_failed", "message": "the loss is not finite", "param": None}
        tell(given.status, state="failed", error=error)
        sys.exit(1)
    version = publish(given)
    last = {"step": total, "total_steps": total, "loss": round(2.0 / total, 4)}
    tell(given.status, state="succeeded", **last, trained_tokens=1000, version=version)


def checkpoint(work: Path, step: int) -> None:
    work.mkdir(exist_ok=True)
    half = work / f".half-{step}"
    lora_folder(half, float(step))
    if not (work / f"checkpoint-{step}").exists():
        half.rename(work / f"checkpoint-{step}")


def publish(given: Any) -> str:
    from onebase.manifest import BaseIdentity  # late: its import takes longer than all the rest
    from onebase.store import AdapterStore

    recipe = given.recipe.read_text()
    name = next(line.split(": ")[1] for line in recipe.splitlines() if line.startswith("name: "))
    base = BaseIdentity(id="tiny/base", revision="1", config_hash="0" * 32, quantization="nf4-dq64")
    source = lora_folder(Path("final"), time.time())
    version = AdapterStore(given.home / "adapters").publish(
        source, name, base=base, aliases=[given.alias], make_current=not given.no_make_current
    )
    return version.id


def evaluate(given: Any, plan: dict[str, Any]) -> None:
    if plan.get("evaluate_holds"):
        wait_for("measure")
    measured = [
        {
            "model": version,
            "response_loss": plan.get("loss", {}).get(version, 1.0),
            "stop_rate": plan.get("stop_rate", {}).get(version, 1.0),
            "examples": 10,
        }
        for version in given.adapter
    ]
    beside = given.out.with_suffix(".tmp")
    beside.write_text(json.dumps({"models": measured}))
    beside.rename(given.out)


def lora_folder(path: Path, value: float) -> Path:
    """PEFT's two files, by hand: numpy takes longer to import than this to write."""
    path.mkdir(parents=True, exist_ok=True)
    shapes = {f"{MODULE}.lora_A.weight": [2, 8], f"{MODULE}.lora_B.weight": [8, 2]}
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [64 * number, 64 * number + 64]}
        for number, (name, shape) in enumerate(shapes.items())
    }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    data = struct.pack("<32f", *[value] * 32)
    (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "tiny/base", "bias": "none"})
    )
    return path


def tell(status: Path, **values: Any) -> None:
    beside = status.with_suffix(".tmp")
    beside.write_text(json.dumps({**values, "pid": os.getpid(), "updated_at": time.time()}))
    beside.replace(status)


if __name__ == "__main__":
    main()
