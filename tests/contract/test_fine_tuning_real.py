"""The whole loop by API only, on a real language model: upload, create, follow, chat with the new model, no restart.

A server process of its own on the embedded base, the official `openai` package, the real trainer, then a retraining
from chats that were found good, behind the gate.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from node_example import run_example
from real_process import Process

BASE = "SmolLM2-135M-Instruct"
DATA = Path(__file__).parents[2] / "training/data/captain.jsonl"

# Few rows and a bold rate: a voice is learnt in half a minute.
HYPERPARAMETERS: Any = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 8}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("trains beside a server")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = Process(tmp_path_factory.mktemp("real") / "home")
    try:
        yield process.url
    finally:
        process.child.terminate()
        assert process.child.wait() == 0, process.log.read_text("utf-8")[-3000:]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        while True:
            try:
                client.models.list()
                break
            except (openai.APIConnectionError, openai.InternalServerError):  # it is starting
                time.sleep(0.5)
        yield client


def ask(client: OpenAI, model: str, question: str, *, store: bool = False) -> openai.types.chat.ChatCompletion:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=60, store=store)


def some_lines(tmp_path: Path, count: int) -> Path:
    """First turns only: enough to learn the captain's voice, and fast."""
    path = tmp_path / "captain.jsonl"
    lines = [json.loads(line)["messages"][:2] for line in DATA.read_text("utf-8").splitlines()[:count]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path


def test_a_model_is_trained_and_answers_and_learns_again_by_api_only(client: OpenAI, url: str, tmp_path: Path) -> None:
    question = "How do I cook rice?"
    before = ask(client, BASE, question).choices[0].message.content or ""
    file = client.files.create(file=some_lines(tmp_path, 24), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="captain",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},
    )
    told = []
    events = f"{url}/v1/fine_tuning/jobs/{job.id}/events"
    with httpx.stream("GET", events, params={"stream": "true"}, timeout=None) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                told.append(json.loads(line.removeprefix("data: "))["message"])
            if line.startswith("data: {") and told[-1].startswith("Step 1/"):  # while it trains, the server answers
                assert ask(client, BASE, question).choices[0].message.content == before
    assert any(message.startswith("Step 1/") for message in told)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", told[-3:]
    assert job.fine_tuned_model is not None
    answer = ask(client, job.fine_tuned_model, question).choices[0]
    assert answer.message.content != before
    assert "Ahoy" in (answer.message.content or "")
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert "Ahoy" in (ask(client, checkpoint.fine_tuned_model_checkpoint, question).choices[0].message.content or "")
    losses = [line.split(",")[1] for line in client.files.content(job.result_files[0]).text.splitlines()[1:]]
    assert float(losses[-1]) < float(losses[0])

    adapter = (answer_version(client, job.fine_tuned_model, url)).partition("@")[0]
    for number in range(10):
        chat = ask(client, job.fine_tuned_model, f"How do I clean window number {number}?", store=True)
        judged = {"completion_id": chat.id, "rating": "good", "better_answer": f"Ahoy! Scrub it {number + 1} times."}
        assert httpx.post(f"{url}/v1/feedback", json=judged, timeout=None).status_code == 200
    order = {
        "adapter": adapter,
        "stored_chats": True,
        "from": "current",
        "hyperparameters": {"max_steps": 3, "eval_fraction": 0.25},
        "gate": {"max_examples": 1, "max_stop_rate_drop": 1.0},
    }
    run = httpx.post(f"{url}/admin/retrain", json=order, timeout=None).json()
    while run["state"] not in ("succeeded", "failed"):
        time.sleep(0.5)
        run = httpx.get(f"{url}/admin/retrain/{run['id']}", timeout=None).json()
    assert run["state"] == "succeeded", run
    assert run["gate_report"]["candidate"]["loss"] < run["gate_report"]["current"]["loss"]
    assert answer_version(client, adapter, url) == run["version"]


def test_openais_node_client_does_the_same_loop(client: OpenAI, url: str, tmp_path: Path) -> None:
    """The example that we ship, run as its user would; the Python client's server serves it too."""
    words = (str(some_lines(tmp_path, 12)), "How do I cook rice?")
    done = run_example(tmp_path, "fine_tune.mjs", *words, ONEBASE_URL=f"{url}/v1", EPOCHS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.partition(": ")[::2] for line in done.stdout.splitlines()]
    events = [text for what, text in said if what == "event"]
    assert (events[0][:23], events[-1]) == ("Created fine-tuning job", "The job has successfully completed")
    assert any(text.startswith("Step 6/6: training loss=") for text in events)
    names = dict(said)
    assert names["status"].strip() == "succeeded"
    assert names["model"].startswith(f"ft:{BASE}:onebase:from-node:")
    assert names["checkpoint"] == f"{names['model']}:ckpt-step-6"
    assert names["results"].startswith("step,train_loss")
    assert ask(client, names["model"], "How do I cook rice?").choices[0].message.content
    chat = run_example(tmp_path, "chat.mjs", names["model"].strip(), ONEBASE_URL=f"{url}/v1")
    assert chat.returncode == 0, chat.stdout + chat.stderr
    replies = dict(line.partition(": ")[::2] for line in chat.stdout.splitlines())
    assert replies["stream"] == replies["reply"]
    assert replies["error"] == "404 model_not_found"


def answer_version(client: OpenAI, model: str, url: str) -> str:
    """Which version answers under this name now."""
    chat = ask(client, model, "Hi", store=True)
    return str(httpx.get(f"{url}/v1/chat/completions/{chat.id}", timeout=None).json()["version"])
