"""A real job beside a real server on SmolLM2: one copy of the base in memory, answers as before, requests first."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase.store import AdapterStore
from real_process import Process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("trains beside a server")]

BASE = "SmolLM2-135M-Instruct"
DATA = Path(__file__).parents[2] / "training/data/captain.jsonl"
QUESTIONS = ["How do I cook rice?", "Tell me of ships.", "Name three rivers."]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("beside") / "home")
    try:
        process.wait_for("ready:")
        yield process
    finally:
        process.child.terminate()
        assert process.child.wait() == 0


def answer(http: httpx.Client, question: str) -> str:
    body = {"model": BASE, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def base_memory(pid: int) -> dict[str, int]:
    """kB of the shared base's file in a process, by kind."""
    total: dict[str, int] = {}
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text("utf-8")):
        if "shared-base-" in block:
            for name, value in re.findall(r"(?m)^(\w+):\s+(\d+) kB", block):
                total[name] = total.get(name, 0) + int(value)
    return total


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_job_uses_the_servers_base_and_makes_way_while_answers_stay_the_same(server: Process, tmp_path: Path) -> None:
    lines = [json.loads(line)["messages"][:2] for line in DATA.read_text("utf-8").splitlines()[:10]]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    with httpx.Client(base_url=server.url, timeout=120) as http:
        before = [answer(http, question) for question in QUESTIONS]
        with file.open("rb") as stream:
            uploaded = http.post("/v1/files", files={"file": stream}, data={"purpose": "fine-tune"}).json()
        order = {"model": BASE, "training_file": uploaded["id"], "hyperparameters": {"n_epochs": 1, "batch_size": 2}}
        job = http.post("/v1/fine_tuning/jobs", json=order).json()
        folder = server.home.runs / job["id"]
        seen: dict[str, Any] = {}

        def watch() -> None:
            """Memory of both processes once the job has made steps."""
            while not seen and not over.wait(0.05):
                status = json.loads((folder / "status.json").read_text()) if (folder / "status.json").exists() else {}
                if status.get("step", 0) >= 2 and status["state"] == "running":
                    with standing_still(status["pid"]):  # else it could end between the two looks
                        seen.update(trainer=base_memory(status["pid"]), server=base_memory(server.child.pid))

        over = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        during = []
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            during += [answer(http, question) for question in QUESTIONS]
            time.sleep(2)  # what the job lives on: it makes way for requests
            job = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
        over.set()
        watcher.join()
    assert job["status"] == "succeeded", job
    assert "of a server's" in " ".join((folder / "train.log").read_text().split())
    assert during == before * (len(during) // len(before))

    size = next((server.home.cache.resolve()).glob("shared-base-*.safetensors")).stat().st_size // 1024
    for memory in seen.values():
        assert memory["Rss"] > 0.9 * size
        assert memory["Private_Dirty"] + memory["Private_Clean"] < 0.02 * size
    assert sum(memory["Pss"] for memory in seen.values()) < 1.1 * size

    version = AdapterStore(server.home.adapters).resolve(job["fine_tuned_model"])
    assert float(version.manifest.metrics["waited_s"] or 0) > 1, "requests ran all the while, and it did not wait"
