"""Run as a process of its own: kill -9 a server and its trainers at seeded random moments, then count what is left.

    python -m job_killer ROOT --seed 1 --kills 200

The server is the real one, HTTP and all, over a fake model and scripted trainers. Orders are sent while it is being
killed, with an idempotency key, and sent again until they are answered, as a careful client does. Afterwards every
order must be exactly one job in a final state, and every adapter in the store whole. Prints one line of JSON; ends with
an error if anything in a job's story is wrong.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

import fake_trainer
from api_world import BASE, base_spec
from onebase.adapter import AdapterFiles, digest
from onebase.errors import OnebaseError
from onebase.store import AdapterStore, Version
from ports import held_port

LINE = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}
FILE = (json.dumps(LINE) + "\n").encode() * 10
FINAL = ("succeeded", "failed", "cancelled")
PLAN = {"steps": 8, "every": 2, "step_s": 0.05}


def serve(root: Path, port: int) -> None:
    """The killed process."""
    from typing import cast

    from fakes import FakeRunner, FakeTokenizer
    from onebase.home import Home
    from onebase.tokenizer import TextTokenizer
    from onebase_server.api.backend import Backend
    from onebase_server.compose import Server, build_deps
    from onebase_server.jobs.process import RunCommand
    from onebase_server.loading import start_backend
    from onebase_server.settings import Settings
    from scripted_base import SCRIPTED_BASE

    settings = Settings(home=Home(root / "home").create(), port=port, retrain_queue=1000)

    def load(_: Settings) -> Backend:
        spec = base_spec(settings.home.bases / "tiny")
        return start_backend(settings, spec, FakeRunner(), cast(TextTokenizer, FakeTokenizer()))

    command = RunCommand(program=(sys.executable, str(Path(fake_trainer.__file__)), str(root / "plan.json")))
    Server(settings, load, build_deps(settings, command, lambda _: SCRIPTED_BASE)).run()


@dataclass
class Order:
    """One wish for a job, sent until it is answered."""

    key: str
    file_id: str | None = None
    job_id: str | None = None


@dataclass
class Killer:
    root: Path
    rng: random.Random
    port: int
    orders: list[Order] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    server: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        with (self.root / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "job_killer", str(self.root), "--serve", str(self.port)],
                stdout=log, stderr=log, cwd=Path(__file__).parent,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        while True:
            assert self.server is not None
            assert self.server.poll() is None, (self.root / "server.log").read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=None).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.02)

    def send(self, order: Order) -> None:
        """Upload and create; whatever the kill cuts off is left for the next try."""
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{self.port}/v1", timeout=None) as client:
                if order.file_id is None:
                    files, data = {"file": ("train.jsonl", FILE)}, {"purpose": "fine-tune"}
                    order.file_id = client.post("/files", files=files, data=data).json()["id"]
                body = {"model": BASE, "training_file": order.file_id, "suffix": order.key, "seed": 1}
                headers = {"Idempotency-Key": order.key}
                reply = client.post("/fine_tuning/jobs", json=body, headers=headers)
                if reply.status_code != 503:  # the base is being loaded
                    order.job_id = reply.json()["id"]
        except httpx.TransportError:
            return

    def trainers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any("fake_trainer" in word for word in words) and any(str(self.root) in word for word in words):
                found.append(process)
        return found

    def kill_trainers(self) -> int:
        killed = 0
        for process in self.trainers():
            with suppress(psutil.NoSuchProcess):  # it has ended since
                process.kill()
                killed += 1
        return killed

    def kill_something(self) -> None:
        victim = self.rng.choice(["server", "trainer", "both"])
        if victim != "server":
            self.kills["trainer"] += self.kill_trainers()
        if victim != "trainer":
            self.kills["server"] += 1
            assert self.server is not None
            self.server.kill()
            self.server.wait()
            self.start()

    def run(self, kills: int) -> None:
        self.start()
        self.wait_until_ready()
        while sum(self.kills.values()) < kills:
            open_orders = [order for order in self.orders if order.job_id is None]
            if not open_orders and self.rng.random() < 0.25:
                self.orders.append(Order(f"order-{len(self.orders)}"))
                open_orders = self.orders[-1:]
            senders = [threading.Thread(target=self.send, args=(order,)) for order in open_orders]
            for sender in senders:
                sender.start()
            time.sleep(self.rng.uniform(0.0, 0.1 if senders and self.rng.random() < 0.5 else 1.0))
            self.kill_something()
            for sender in senders:
                sender.join()
            if self.rng.random() < 0.9:  # else it is killed again while it starts
                self.wait_until_ready()

    def finish(self) -> list[dict[str, Any]]:
        """Answer every order and let every job end; the jobs."""
        self.wait_until_ready()
        for order in self.orders:
            while order.job_id is None:
                self.send(order)
        while True:
            jobs = self.get("fine_tuning/jobs?limit=1000")
            if all(job["status"] in FINAL for job in jobs):
                return jobs
            time.sleep(0.1)

    def get(self, path: str) -> list[dict[str, Any]]:
        """The items of a list."""
        return list(httpx.get(f"http://127.0.0.1:{self.port}/v1/{path}", timeout=None).json()["data"])

    def check(self, jobs: list[dict[str, Any]]) -> dict[str, int]:
        """What went wrong, counted; asserts what is wrong within a job."""
        ids = [str(job["id"]) for job in jobs]
        wanted = [order.job_id for order in self.orders]
        assert self.trainers() == []
        store = AdapterStore(self.root / "home/adapters")
        for job in jobs:
            self.check_story(job, store.aliases())
        return {
            "lost": len(set(wanted) - set(ids)),
            "duplicated": len(ids) - len(set(wanted)),
            "half_served": sum(not is_whole(version) for entry in store.list() for version in entry.versions),
        }

    def check_story(self, job: dict[str, Any], aliases: dict[str, str]) -> None:
        events = self.get(f"fine_tuning/jobs/{job['id']}/events?limit=1000")
        messages = [event["message"] for event in events if event["type"] == "message"]
        steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
        points = self.get(f"fine_tuning/jobs/{job['id']}/checkpoints")
        assert len(steps) == len(set(steps)), steps
        assert messages.count("The job has successfully completed") == (job["status"] == "succeeded")
        adapter = job["id"][-8:]
        mine = {alias for alias, version in aliases.items() if version.partition("@")[0].endswith(adapter)}
        names = {point["fine_tuned_model_checkpoint"] for point in points}
        assert names == {alias for alias in mine if ":ckpt-step-" in alias}, (job["id"], names, mine)
        if job["status"] == "succeeded":
            assert sorted(steps) == list(range(1, PLAN_STEPS + 1)), (job["id"], steps)
            assert mine - names == {job["fine_tuned_model"]}, mine


def is_whole(version: Version) -> bool:
    try:
        AdapterFiles.read(version.path)
    except OnebaseError:
        return False
    return digest(version.path) == version.digest


PLAN_STEPS = int(PLAN["steps"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--serve", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)
    given = parser.parse_args()
    if given.serve is not None:
        return serve(given.root, given.serve)
    given.root.mkdir(parents=True, exist_ok=True)
    (given.root / "plan.json").write_text(json.dumps(PLAN))
    held = held_port()
    killer = Killer(given.root, random.Random(given.seed), held.getsockname()[1])
    started = time.monotonic()
    try:
        killer.run(given.kills)
        jobs = killer.finish()
        wrong = killer.check(jobs)
    finally:
        if killer.server is not None:
            killer.server.kill()
            killer.server.wait()
        killer.kill_trainers()
        held.close()
    states = dict(Counter(job["status"] for job in jobs))
    report = {"seed": given.seed, "kills": dict(killer.kills), "jobs": len(jobs), **wrong, "states": states}
    print(json.dumps({**report, "seconds": round(time.monotonic() - started)}))
    return None


if __name__ == "__main__":
    main()
