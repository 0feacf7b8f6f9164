"""`/admin/retrain` over HTTP, with a scripted training process."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fake_trainer
from api_world import World, error_of, open_world
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.settings import load_settings


@pytest.fixture
def trained(tmp_path: Path, loop: Any) -> Iterator[World]:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    with open_world(tmp_path, loop, trainer=(sys.executable, fake_trainer.__file__, str(plan))) as world:
        (world.home.root / "datasets").mkdir()
        (world.home.root / "datasets/good").write_text("x")
        yield world
    let_go(world)


def script(world: World, **plan: Any) -> None:
    (world.home.root.parent / "plan.json").write_text(json.dumps(plan))


def let_go(world: World) -> None:
    """A run that holds goes on."""
    (world.home.root.parent / "go").touch()


def start(world: World, **fields: Any) -> str:
    reply = world.post("/admin/retrain", {"adapter": "pirate", "dataset": "good", **fields})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["state"] == "queued"
    return str(body["id"])


def wait_for(world: World, run_id: str, *states: str, step: int = 0) -> dict[str, Any]:
    """Polls as a client does; the test's own time limit is that of the whole suite."""
    while True:
        run: dict[str, Any] = world.get(f"/admin/retrain/{run_id}").json()
        if run["state"] in states and run["step"] >= step:
            return run
        assert run["state"] not in ("succeeded", "failed", "cancelled"), run
        world.loop.run_until_complete(asyncio.sleep(0.01))


def test_a_run_goes_from_queued_to_a_served_version(trained: World) -> None:
    script(trained, steps=4)
    run = wait_for(trained, start(trained), "succeeded")
    assert run["object"] == "retrain.run"
    assert (run["version"], run["step"], run["total_steps"], run["loss"]) == ("pirate@1", 4, 4, 0.5)
    assert run["error"] is None
    assert run["created_at"] <= run["started_at"] <= run["finished_at"]
    assert trained.chat(model="pirate").json()["choices"][0]["message"]["content"].startswith("pirate@1")
    events = trained.get(f"/v1/fine_tuning/jobs/{run['id']}/events").json()["data"]
    assert events[0]["message"] == "The job has successfully completed"


@pytest.mark.slow
def test_a_run_can_be_watched_and_cancelled_while_the_server_answers(trained: World) -> None:
    script(trained, steps=4, holds=1)
    run_id, waiting = start(trained), start(trained)
    run = wait_for(trained, run_id, "running", step=1)
    assert (run["step"], run["total_steps"]) == (1, 4)
    assert trained.chat().status_code == 200
    assert trained.get(f"/admin/retrain/{waiting}").json()["state"] == "queued"
    assert trained.post(f"/admin/retrain/{waiting}/cancel").json()["state"] == "cancelled"
    assert trained.post(f"/admin/retrain/{run_id}/cancel").json()["state"] == "cancelled"
    reply = trained.post(f"/admin/retrain/{run_id}/cancel")
    assert (reply.status_code, error_of(reply)["code"]) == (400, "invalid_job_state")
    assert [run["id"] for run in trained.get("/admin/retrain").json()["data"]] == [waiting, run_id]
    assert trained.chat(model="pirate").status_code == 404


@pytest.mark.slow
def test_a_trainer_that_gives_up_is_a_failed_run_with_its_last_words(trained: World) -> None:
    script(trained, ends=["give up"])
    run = wait_for(trained, start(trained), "failed")
    assert run["error"]["code"] == "trainer_died"
    assert "exit code 3" in run["error"]["message"]
    assert "out of luck" in run["error"]["message"]
    assert run["version"] is None


@pytest.mark.parametrize("run_id", ["run-0", "nothing", "..", "run-1234567890-abcdef01"])
def test_an_unknown_run_is_404(world: World, run_id: str) -> None:
    assert world.get(f"/admin/retrain/{run_id}").status_code == 404
    assert world.post(f"/admin/retrain/{run_id}/cancel").status_code == 404


@pytest.mark.slow
def test_the_recipe_has_what_was_asked(trained: World) -> None:
    trained.publish("pirate")
    script(trained, holds=1)
    hyperparameters = {"epochs": 2, "r": 4, "max_tokens": 64, "seed": 7}
    run_id = start(trained, preset="seed", hyperparameters=hyperparameters, gate=True, **{"from": "current"})
    wait_for(trained, run_id, "running", step=1)
    recipe = yaml.safe_load(RunFolder(trained.home.runs, run_id).recipe.read_text())
    assert recipe == {
        "name": "pirate",
        "base": str(trained.deps.backend.get().base.path),
        "preset": "seed",
        "resume_from": "pirate@1",
        "data": {
            "train": [str(RunFolder(trained.home.runs, run_id).dataset / "good")],
            "prompt_format": "human_response",
            "max_tokens": 64,
            "eval_fraction": 0.1,
        },
        "train": {"epochs": 2, "seed": 7},
        "lora": {"r": 4},
    }
    trained.post(f"/admin/retrain/{run_id}/cancel")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"adapter": None}, "adapter", "invalid_type"),
    ({"adapter": "No Such Name"}, "adapter", "invalid_value"),
    ({"adapter": "../up"}, "adapter", "invalid_value"),
    ({"dataset": None}, "dataset", "invalid_value"),
    ({"training_file": "file-1"}, "dataset", "invalid_value"),
    ({"dataset": None, "training_file": "file-1"}, "training_file", "invalid_value"),
    ({"dataset": None, "stored_chats": True}, "stored_chats", "invalid_n_examples"),
    ({"from": "here"}, "from", "invalid_value"),
    ({"from": "current"}, "from", "invalid_value"),
    ({"gate": "yes"}, "gate", "invalid_type"),
    ({"gate": {"max_loss": 1}}, "gate.max_loss", "unknown_parameter"),
    ({"gate": {"max_examples": 0}}, "gate.max_examples", "integer_below_min_value"),
    ({"dataset": ""}, "dataset", "invalid_value"),
    ({"dataset": "missing.jsonl"}, "dataset", "invalid_value"),
    ({"dataset": "/etc/passwd"}, "dataset", "invalid_value"),
    ({"dataset": "../adapters"}, "dataset", "invalid_value"),
    ({"dataset": "link"}, "dataset", "invalid_value"),
    ({"dataset": "loop"}, "dataset", "invalid_value"),
    ({"dataset": "a\0b"}, "dataset", "invalid_value"),
    ({"dataset": "x" * 5000}, "dataset", "invalid_value"),
    ({"preset": "best"}, "preset", "invalid_value"),
    ({"hyperparameters": {"epochs": 0}}, "hyperparameters.epochs", "decimal_below_min_value"),
    ({"hyperparameters": {"epoch": 1}}, "hyperparameters.epoch", "unknown_parameter"),
    ({"hyperparameters": {"r": 4.5}}, "hyperparameters.r", "invalid_type"),
    ({"base": "other"}, "base", "unknown_parameter"),
]


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    """A server that makes no run: no order here is good."""
    with open_world(tmp_path_factory.mktemp("refusing"), loop) as world:
        datasets = world.home.root / "datasets"
        datasets.mkdir()
        (datasets / "good").write_text("x")
        (datasets / "link").symlink_to("/etc/passwd")
        (datasets / "loop").symlink_to("loop")
        yield world


@pytest.mark.parametrize(
    ("fields", "param", "code"), REFUSED, ids=[f"{param}-{i}" for i, (_, param, _) in enumerate(REFUSED)]
)
def test_a_wrong_order_is_refused_and_leaves_nothing(
    refusing: World, fields: dict[str, Any], param: str, code: str
) -> None:
    reply = refusing.post("/admin/retrain", {"adapter": "fresh", "dataset": "good", **fields})
    assert reply.status_code == 400, reply.text
    assert (error_of(reply)["param"], error_of(reply)["code"]) == (param, code)
    assert list(refusing.home.runs.iterdir()) == []


def test_an_unknown_version_to_go_on_from_is_404(own_world: World) -> None:
    (own_world.home.root / "datasets").mkdir()
    (own_world.home.root / "datasets/good").write_text("x")
    reply = own_world.post("/admin/retrain", {"adapter": "pirate", "dataset": "good", "resume_from": "pirate@9"})
    assert reply.status_code == 404


def test_more_runs_than_may_wait_are_429(tmp_path: Path, loop: Any) -> None:
    with open_world(tmp_path, loop, settings={"retrain_queue": 1}) as world:
        loop.run_until_complete(world.deps.durable.supervisor.stop())
        (world.home.root / "datasets").mkdir()
        (world.home.root / "datasets/good").write_text("x")
        start(world)
        reply = world.post("/admin/retrain", {"adapter": "pirate", "dataset": "good"})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "60"


def test_the_trainer_does_not_get_the_servers_secrets(tmp_path: Path) -> None:
    secrets = {
        "ONEBASE_ADMIN_KEY": "sk-admin-key-1",
        "ONEBASE_API_KEYS": "sk-some-key-1",
        "ONEBASE_DATABASE": "postgresql://me:secret@host/name",
    }
    settings = load_settings({**os.environ, **secrets}, {"home": tmp_path})
    assert not set(secrets) & set(settings.trainer_env)
    assert not set(secrets.values()) & set(settings.trainer_env.values())


def test_a_retry_finds_its_run_though_what_it_goes_on_from_has_moved(trained: World) -> None:
    trained.publish("pirate")
    body, headers = {"adapter": "pirate", "dataset": "good", "from": "current"}, {"Idempotency-Key": "once"}
    first = trained.post("/admin/retrain", body, headers=headers).json()
    assert first["start_from"] == "pirate@1"
    trained.publish("pirate")
    assert trained.post("/admin/retrain", body, headers=headers).json()["id"] == first["id"]
    reply = trained.post("/admin/retrain", {**body, "from": "scratch"}, headers=headers)
    assert reply.status_code == 400
    assert error_of(reply)["code"] == "idempotency_key_reused"


@pytest.mark.slow
def test_a_rollback_by_hand_is_not_undone_by_a_run_that_was_ordered_before(trained: World) -> None:
    for _ in range(2):
        trained.publish("pirate")
    script(trained, holds=0)
    run_id = start(trained)
    trained.post("/admin/adapters/pirate/rollback")
    let_go(trained)
    run = wait_for(trained, run_id, "failed")
    assert (run["error"]["code"], run["version"]) == ("name_moved", "pirate@3")
    assert trained.get("/admin/adapters/pirate").json()["current"] == "pirate@1"
