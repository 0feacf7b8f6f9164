"""`/admin/retrain` with a stand-in for the trainer: a shell script whose "dataset" says how the training goes."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_world import World, error_of, lora_folder, open_world
from onebase_server.jobs.run_record import RunFolder
from onebase_server.jobs.supervisor import Supervisor, SupervisorConfig
from onebase_server.jobs.trainer_process import TrainerCommand

TRAINER = """
recipe=$1 home=$3 status=$5
dataset=$(sed -n 's/^ *- //p' "$recipe" | head -n 1)
say() { printf '%s' "$1" > "$status.new" && mv "$status.new" "$status"; }
. "$dataset"
"""
SUCCEED = """say '{"state": "succeeded", "version": "pirate@7", "step": 4, "total_steps": 4, "loss": 0.5}'\n"""
FAIL = """say '{"state": "failed", "error":
  {"code": "invalid_training_file", "message": "line 3: no role", "param": "training_file"}}'; exit 1\n"""
DIE = "echo 'Traceback: out of luck'; exit 3\n"
HANG = """trap 'say "{\\"state\\": \\"cancelled\\"}"; exit 0' TERM
say '{"state": "running", "step": 1, "total_steps": 4, "loss": 2.5, "pid": 1, "secret": 1}'
while :; do sleep 0.02; done\n"""
STUBBORN = """trap '' TERM; say '{"state": "running"}'; while :; do sleep 0.02; done\n"""
LEAKY = """[ -z "$ONEBASE_ADMIN_KEY$ONEBASE_API_KEYS" ] && say '{"state": "succeeded", "version": "pirate@1"}'\n"""


@pytest.fixture
def trained(tmp_path: Path, loop: Any) -> Iterator[World]:
    script = tmp_path / "trainer.sh"
    script.write_text(TRAINER)
    with open_world(tmp_path, loop, trainer=("sh", str(script))) as world:
        datasets = world.home.root / "datasets"
        datasets.mkdir()
        for name, text in {"succeed": SUCCEED, "fail": FAIL, "die": DIE, "hang": HANG, "stubborn": STUBBORN}.items():
            (datasets / name).write_text(text)
        world.deps.jobs.start()
        yield world
        for run in world.deps.jobs.list():
            if run.pid and not run.is_final:
                os.killpg(run.pid, signal.SIGKILL)


def start(world: World, dataset: str, **fields: Any) -> str:
    reply = world.post("/admin/retrain", {"adapter": "pirate", "dataset": dataset, **fields})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["state"] == "queued"
    return str(body["id"])


def wait_for(world: World, run_id: str, *states: str) -> dict[str, Any]:
    """Polls as a client does; the test's own time limit is that of the whole suite."""
    while True:
        run: dict[str, Any] = world.get(f"/admin/retrain/{run_id}").json()
        if run["state"] in states:
            return run
        assert run["state"] not in ("succeeded", "failed", "cancelled"), run
        time.sleep(0.01)


def test_a_run_goes_from_queued_to_succeeded_and_names_its_version(trained: World) -> None:
    run = wait_for(trained, start(trained, "succeed"), "succeeded")
    assert run["object"] == "retrain.run"
    assert run["version"] == "pirate@7"
    assert run["progress"] == {"step": 4, "total_steps": 4, "loss": 0.5}
    assert run["error"] is None
    assert run["created_at"] <= run["started_at"] <= run["finished_at"]


def test_progress_is_shown_while_it_runs(trained: World) -> None:
    run_id = start(trained, "hang")
    wait_for(trained, run_id, "running")
    while not (run := trained.get(f"/admin/retrain/{run_id}").json())["progress"]:
        time.sleep(0.01)
    assert run["progress"] == {"step": 1, "total_steps": 4, "loss": 2.5}


def test_a_failed_run_says_why(trained: World) -> None:
    run = wait_for(trained, start(trained, "fail"), "failed")
    assert run["error"] == {"code": "invalid_training_file", "message": "line 3: no role", "param": "training_file"}
    assert run["version"] is None


def test_a_trainer_that_dies_is_a_failed_run_with_its_last_words(trained: World) -> None:
    run = wait_for(trained, start(trained, "die"), "failed")
    assert run["error"]["code"] == "trainer_died"
    assert "exit code 3" in run["error"]["message"]
    assert "out of luck" in run["error"]["message"]


def test_a_killed_trainer_is_a_failed_run(trained: World) -> None:
    run_id = start(trained, "hang")
    wait_for(trained, run_id, "running")
    os.killpg(pid_of(trained, run_id), signal.SIGKILL)
    run = wait_for(trained, run_id, "failed")
    assert "killed by signal 9" in run["error"]["message"]
    assert trained.chat().status_code == 200


def test_a_cancelled_run_ends_cleanly(trained: World) -> None:
    run_id = start(trained, "hang")
    wait_for(trained, run_id, "running")
    assert trained.post(f"/admin/retrain/{run_id}/cancel").json()["state"] == "running"
    assert wait_for(trained, run_id, "cancelled")["error"] is None


def test_a_trainer_that_does_not_listen_is_killed(trained: World) -> None:
    trained.deps.jobs._config = SupervisorConfig(poll_s=0.01, cancel_grace_s=0.05)
    run_id = start(trained, "stubborn")
    wait_for(trained, run_id, "running")
    pid = pid_of(trained, run_id)
    trained.post(f"/admin/retrain/{run_id}/cancel")
    wait_for(trained, run_id, "cancelled")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_runs_go_one_at_a_time_and_a_waiting_one_can_be_cancelled(trained: World) -> None:
    first, second, third = start(trained, "hang"), start(trained, "succeed"), start(trained, "succeed")
    wait_for(trained, first, "running")
    assert trained.get(f"/admin/retrain/{second}").json()["state"] == "queued"
    assert trained.post(f"/admin/retrain/{second}/cancel").json()["state"] == "cancelled"
    trained.post(f"/admin/retrain/{first}/cancel")
    assert wait_for(trained, third, "succeeded")
    assert trained.get(f"/admin/retrain/{second}").json()["started_at"] is None
    listed = trained.get("/admin/retrain").json()
    assert [run["id"] for run in listed["data"]] == sorted((first, second, third), reverse=True)


def test_a_finished_run_cannot_be_cancelled(trained: World) -> None:
    run_id = start(trained, "succeed")
    wait_for(trained, run_id, "succeeded")
    reply = trained.post(f"/admin/retrain/{run_id}/cancel")
    assert (reply.status_code, error_of(reply)["code"]) == (400, "run_has_ended")


@pytest.mark.parametrize("run_id", ["run-0", "nothing", "..", "run-1234567890-abcdef01"])
def test_an_unknown_run_is_404(trained: World, run_id: str) -> None:
    assert trained.get(f"/admin/retrain/{run_id}").status_code == 404
    assert trained.post(f"/admin/retrain/{run_id}/cancel").status_code == 404


def test_the_recipe_has_what_was_asked(trained: World) -> None:
    trained.publish("pirate")
    run_id = start(
        trained,
        "succeed",
        preset="seed",
        resume_from="pirate@1",
        hyperparameters={"epochs": 2, "r": 4, "max_tokens": 64},
    )
    recipe = yaml.safe_load(folder_of(trained, run_id).recipe.read_text())
    assert recipe == {
        "name": "pirate",
        "base": str(trained.deps.backend.get().base.path),
        "preset": "seed",
        "resume_from": "pirate@1",
        "data": {
            "train": [str(trained.home.root / "datasets/succeed")],
            "prompt_format": "human_response",
            "max_tokens": 64,
        },
        "train": {"epochs": 2},
        "lora": {"r": 4},
    }
    wait_for(trained, run_id, "succeeded")


def test_a_version_that_the_trainer_published_is_served_at_once(trained: World) -> None:
    run_id = start(trained, "succeed")
    wait_for(trained, run_id, "succeeded")
    trained.store.publish(
        lora_folder(trained.home.root / "out"), "pirate", base=trained.deps.backend.get().base.identity
    )
    assert trained.chat(model="pirate").json()["choices"][0]["message"]["content"].startswith("pirate@1")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"adapter": None}, "adapter", "invalid_type"),
    ({"adapter": "No Such Name"}, "adapter", "invalid_value"),
    ({"adapter": "../up"}, "adapter", "invalid_value"),
    ({"dataset": None}, "dataset", "invalid_type"),
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


@pytest.mark.parametrize(
    ("fields", "param", "code"), REFUSED, ids=[f"{param}-{i}" for i, (_, param, _) in enumerate(REFUSED)]
)
def test_a_wrong_order_is_refused_and_leaves_nothing(
    own_world: World, fields: dict[str, Any], param: str, code: str
) -> None:
    datasets = own_world.home.root / "datasets"
    datasets.mkdir(exist_ok=True)
    (datasets / "good").write_text("x")
    (datasets / "link").symlink_to("/etc/passwd")
    (datasets / "loop").symlink_to("loop")
    reply = own_world.post("/admin/retrain", {"adapter": "pirate", "dataset": "good", **fields})
    assert reply.status_code == 400, reply.text
    assert (error_of(reply)["param"], error_of(reply)["code"]) == (param, code)
    assert list(own_world.home.runs.iterdir()) == []


def test_an_unknown_version_to_go_on_from_is_404(own_world: World) -> None:
    (own_world.home.root / "datasets").mkdir()
    (own_world.home.root / "datasets/good").write_text("x")
    reply = own_world.post("/admin/retrain", {"adapter": "pirate", "dataset": "good", "resume_from": "pirate@9"})
    assert reply.status_code == 404


def test_more_runs_than_may_wait_are_429(trained: World) -> None:
    trained.deps.jobs._config = SupervisorConfig(queue_limit=1, poll_s=0.01)
    wait_for(trained, start(trained, "hang"), "running")
    start(trained, "succeed")
    reply = trained.post("/admin/retrain", {"adapter": "pirate", "dataset": "succeed"})
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "60"


# A server that comes back


def restarted(world: World, tmp_path: Path) -> Supervisor:
    world.deps.jobs.stop()
    command = TrainerCommand(program=("sh", str(tmp_path / "trainer.sh")))
    return Supervisor(world.home, command, SupervisorConfig(poll_s=0.01))


def wait(jobs: Supervisor, run_id: str, *states: str) -> None:
    while jobs.get(run_id).state not in states:
        time.sleep(0.01)


def test_a_restarted_server_takes_up_the_running_trainer(trained: World, tmp_path: Path) -> None:
    run_id = start(trained, "hang")
    wait_for(trained, run_id, "running")
    jobs = restarted(trained, tmp_path)
    assert jobs.get(run_id).state == "running", "the trainer went on"
    jobs.start()
    jobs.cancel(run_id)
    wait(jobs, run_id, "cancelled")
    jobs.stop()


def test_a_trainer_that_ended_meanwhile_is_judged_by_its_last_word(trained: World, tmp_path: Path) -> None:
    run_id = start(trained, "hang")
    wait_for(trained, run_id, "running")
    jobs = restarted(trained, tmp_path)
    os.killpg(pid_of(trained, run_id), signal.SIGKILL)
    folder_of(trained, run_id).status.write_text('{"state": "succeeded", "version": "pirate@3"}')
    jobs.start()
    wait(jobs, run_id, "succeeded")
    assert jobs.get(run_id).version == "pirate@3"
    jobs.stop()


def test_a_trainer_that_died_meanwhile_is_a_failed_run(trained: World, tmp_path: Path) -> None:
    run_id = start(trained, "hang")
    wait_for(trained, run_id, "running")
    jobs = restarted(trained, tmp_path)
    os.killpg(pid_of(trained, run_id), signal.SIGKILL)
    jobs.start()
    wait(jobs, run_id, "failed")
    assert (jobs.get(run_id).error or {})["code"] == "trainer_died"
    jobs.stop()


def test_a_pid_given_to_another_process_is_not_taken_for_the_trainer(trained: World, tmp_path: Path) -> None:
    from dataclasses import replace

    run_id = start(trained, "hang")
    wait_for(trained, run_id, "running")
    trainer = pid_of(trained, run_id)
    jobs = restarted(trained, tmp_path)
    folder = folder_of(trained, run_id)
    run = folder.read()
    assert run is not None
    folder.write(replace(run, pid=os.getpid()))
    jobs.start()
    wait(jobs, run_id, "failed")
    jobs.stop()
    os.killpg(trainer, signal.SIGKILL)


def test_a_queue_survives_a_restart(trained: World, tmp_path: Path) -> None:
    trained.deps.jobs.stop()
    run_id = start(trained, "succeed")
    jobs = restarted(trained, tmp_path)
    jobs.start()
    wait(jobs, run_id, "succeeded")
    jobs.stop()


def test_the_trainer_does_not_get_the_servers_keys(trained: World, tmp_path: Path) -> None:
    from onebase_server.settings import load_settings

    env = {**os.environ, "ONEBASE_ADMIN_KEY": "sk-admin-key-1", "ONEBASE_API_KEYS": "sk-some-key-1"}
    settings = load_settings(env, {"home": trained.home.root})
    (trained.home.root / "datasets/leaky").write_text(LEAKY)
    trained.deps.jobs._command = TrainerCommand(("sh", str(tmp_path / "trainer.sh")), env=settings.trainer_env)
    wait_for(trained, start(trained, "leaky"), "succeeded")


def pid_of(world: World, run_id: str) -> int:
    pid = world.deps.jobs.get(run_id).pid
    assert pid is not None
    return pid


def folder_of(world: World, run_id: str) -> RunFolder:
    return RunFolder(world.home.runs, run_id)
