"""Runs that end before their time: killed, cancelled, paused. And one run on two processes."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from onebase.adapter import WEIGHTS
from onebase.errors import TrainingError
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_training import checkpoint, trainer
from onebase_training import train as training
from onebase_training.config import make_recipe
from onebase_training.status import StatusWriter
from onebase_training.train import Run, RunOptions, RunResult, carry_out
from onebase_training.trainer import StepDataset
from tiny_base import recipe, sharegpt_file, write_recipe

pytestmark = pytest.mark.slow

CANCELLED = 130


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """40 steps. With dropout: its random stream must go on where it stopped."""
    settings = {"epochs": 8, "save_every": 3, "eval_every": "never"}
    return recipe(sharegpt_file(tmp_path / "data.jsonl"), train=settings, lora={"dropout": 0.1})


def train(
    home: Home, content: dict[str, Any], folder: Path, *, resume: bool = False, again: str = ""
) -> tuple[RunResult, str]:
    """In this process. The result and what was said."""
    said = Console(file=StringIO(), width=200)
    status = StatusWriter(folder / "status.json")
    result = carry_out(
        Run(make_recipe(content), home, folder, status, said, RunOptions(resume=resume, resume_command=again))
    )
    assert isinstance(said.file, StringIO)
    return result, said.file.getvalue()


def start(home: Home, recipe_file: Path, folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    """As a process of its own, by the command line."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "onebase_training",
            str(recipe_file),
            "--home",
            str(home.root),
            "--run-dir",
            str(folder),
            "--status",
            str(folder / "status.json"),
            *words,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start_two(home: Home, recipe_file: Path, folder: Path) -> list[subprocess.Popen[str]]:
    """As `accelerate launch` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [start(home, recipe_file, folder, RANK=r, LOCAL_RANK=r, **meet) for r in ("0", "1")]


def weights(folder: Path) -> dict[str, Any]:
    return dict(load_file(folder / "adapter" / WEIGHTS))


def status(folder: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return {}
    return told


def signal_at_step(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """The signal comes while that step is under way."""
    original = StepDataset.__getitem__

    def spied(self: StepDataset, index: int) -> Any:
        if index + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, index)

    monkeypatch.setattr(StepDataset, "__getitem__", spied)


def assert_equal_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one) == set(other)
    assert all((one[name] == other[name]).all() for name in one)


def test_pitfall_14_a_killed_run_goes_on_to_the_very_same_weights(
    home: Home, tmp_path: Path, content: dict[str, Any]
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(home, write_recipe(tmp_path / "recipe.yaml", content), killed)
    while not (killed / "checkpoint-6").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not AdapterStore(home.adapters).list()
    assert not (killed / "adapter").exists()

    train(home, content, killed, resume=True)
    train(home, content, whole)

    assert_equal_bits(weights(killed), weights(whole))


def test_the_last_epoch_leaves_a_checkpoint_too_and_from_there_on_only_publishing_is_left(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["train"] |= {"epochs": 1, "save_every": "epoch"}
    with monkeypatch.context() as patched:
        patched.setattr(training, "_publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(home, content, tmp_path / "cut")
    assert checkpoint.last_checkpoint(tmp_path / "cut") == tmp_path / "cut/checkpoint-5"

    result, said = train(home, content, tmp_path / "cut", resume=True)
    train(home, content, tmp_path / "whole")

    assert (result.state, result.metrics["steps"]) == ("succeeded", 5)
    assert "going on from" in said
    assert_equal_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGINT), (6, signal.SIGINT), (5, signal.SIGTERM)])
def test_a_signal_saves_a_checkpoint_says_how_to_go_on_and_nothing_is_lost(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int, number: int
) -> None:
    with monkeypatch.context() as patched:
        signal_at_step(patched, step, number)
        result, said = train(home, content, tmp_path / "stopped", again="onebase train r.yaml --resume")

    assert result.state == "cancelled"
    assert "Go on with: onebase train r.yaml --resume" in said
    saved = checkpoint.last_checkpoint(tmp_path / "stopped")
    assert saved == tmp_path / f"stopped/checkpoint-{step}"
    told = status(tmp_path / "stopped")
    assert (told["state"], told["checkpoint"], told["version"]) == ("cancelled", str(saved), None)
    assert not AdapterStore(home.adapters).list()
    train(home, content, tmp_path / "stopped", resume=True)
    train(home, content, tmp_path / "whole")
    assert_equal_bits(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_ctrl_c_twice_ends_at_once_and_the_last_whole_checkpoint_stays(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StepDataset.__getitem__

    def spied(self: StepDataset, index: int) -> Any:
        for _ in range(2 if index + 1 == 5 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, index)

    monkeypatch.setattr(StepDataset, "__getitem__", spied)

    result, said = train(home, content, tmp_path / "run")

    assert result.state == "cancelled"
    assert "stopped at once" in said
    assert f"saved {tmp_path}/run/checkpoint-3" in said
    assert not (tmp_path / "run/checkpoint-5").exists()


def test_the_last_line_of_a_stopped_command_is_the_command_that_goes_on(
    home: Home, tmp_path: Path, content: dict[str, Any]
) -> None:
    content["train"] |= {"epochs": 400, "save_every": "never"}
    file, folder = write_recipe(tmp_path / "the recipe.yaml", content), tmp_path / "run"
    process = start(home, file, folder)
    while not status(folder).get("step"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]

    assert process.returncode == CANCELLED, said
    command = f"onebase train '{file}' --home {home.root} --run-dir {folder} --status {folder}/status.json --resume"
    assert said.splitlines()[-1].endswith(f"Go on with: {command}")

    content["train"] |= {"epochs": 1}
    quiet = start(home, write_recipe(file, content), tmp_path / "quiet", "--quiet")
    assert quiet.communicate() == ("", "")
    assert quiet.returncode == 0


def test_the_launchers_sigterm_behind_a_ctrl_c_still_leaves_time_for_the_checkpoint(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at_step(monkeypatch, 4, signal.SIGINT)
    signal_at_step(monkeypatch, 4, signal.SIGTERM)

    train(home, content, tmp_path / "run")

    assert checkpoint.last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-4"


@pytest.mark.parametrize("settings", [{"eval_every": 3}, {"eval_every": "epoch", "epochs": 1}], ids=["middle", "end"])
def test_a_signal_in_an_evaluation_ends_it_and_the_resumed_run_makes_up_for_it(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    content["train"] |= {"max_steps": 5, "save_every": "never", "early_stopping": 9, **settings}
    at = 5 if settings["eval_every"] == "epoch" else 3
    original, measured = trainer.held_out_metrics, []

    def signalled(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        measured.append(original(*args, **named))
        return measured[-1]

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "held_out_metrics", signalled)
        result, _ = train(home, content, tmp_path / "stopped")
    assert (result.state, measured) == ("cancelled", [{}])
    assert checkpoint.last_checkpoint(tmp_path / "stopped") == tmp_path / f"stopped/checkpoint-{at}"

    resumed, _ = train(home, content, tmp_path / "stopped", resume=True)
    whole, _ = train(home, content, tmp_path / "whole")

    assert_equal_bits(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    same = ("eval_loss", "eval_step")
    assert [resumed.metrics[name] for name in same] == [whole.metrics[name] for name in same]


def test_a_signal_before_the_first_step_ends_the_run_at_once(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_training.beside.load_base", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))

    result, _ = train(home, content, tmp_path / "run")

    assert result.state == status(tmp_path / "run")["state"] == "cancelled"


def test_after_a_run_signals_mean_what_they_meant_before(home: Home, tmp_path: Path, content: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    train(home, {**content, "train": {"max_steps": 1}}, tmp_path / "run")

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    whole, half = tmp_path / "checkpoint-3", tmp_path / ".staging" / "checkpoint-6"
    for folder in (whole, half):
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"x")

    assert checkpoint.last_checkpoint(tmp_path) == whole

    committed = checkpoint.commit_checkpoint(half, tmp_path, keep=1)
    assert checkpoint.last_checkpoint(tmp_path) == committed == tmp_path / "checkpoint-6"
    assert not whole.exists()


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_leads_to_the_same_weights(
    home: Home, tmp_path: Path, content: dict[str, Any]
) -> None:
    content["train"]["max_steps"] = 7
    train(home, content, tmp_path / "run")
    whole = weights(tmp_path / "run")
    newest = tmp_path / "run/checkpoint-6"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-100])

    _, said = train(home, content, tmp_path / "run", resume=True)

    assert "optimizer.pt is not as it was written" in said
    assert f"going on from {tmp_path}/run/checkpoint-3" in said
    assert_equal_bits(weights(tmp_path / "run"), whole)
    assert checkpoint.damage(newest) is None, "made anew"

    for folder in (newest, tmp_path / "run/checkpoint-3"):
        (folder / WEIGHTS).unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint in .* is whole"):
        train(home, content, tmp_path / "run", resume=True)
    assert newest.exists(), "nothing is thrown away unasked"


def test_a_disk_that_is_full_ends_the_run_in_clear_words_and_the_checkpoint_before_stays_whole(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = torch.save, []

    def half_written(what: Any, place: Any, *args: Any, **named: Any) -> None:
        saved.append(place)
        if "checkpoint-6" in str(place):
            Path(place).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(place))
        save(what, place, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half_written)
        with pytest.raises(TrainingError, match=r"no room to write.*go on from .*checkpoint-3 with --resume"):
            train(home, content, tmp_path / "run")

    assert status(tmp_path / "run")["error"]["code"] == "disk_full"
    assert not (tmp_path / "run/.staging").exists()
    assert checkpoint.damage(tmp_path / "run/checkpoint-3") is None
    assert checkpoint.last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-3"
    train(home, content, tmp_path / "run", resume=True)


def test_a_status_that_cannot_be_written_ends_no_run(
    home: Home, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onebase_training.status.replace_file", full)
    content["train"] = {"max_steps": 1}

    assert train(home, content, tmp_path / "run")[0].state == "succeeded"


def test_the_best_so_far_goes_only_once_a_better_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(_model: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(b"x")

    monkeypatch.setattr(checkpoint, "save_adapter", write)
    assert checkpoint.best_adapter(tmp_path) is None
    for step in (2, 10):
        checkpoint.save_best(None, tmp_path, step)
        assert checkpoint.best_adapter(tmp_path) == tmp_path / f"best-{step}"
    assert [path.name for path in tmp_path.iterdir()] == ["best-10"]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_adapter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint.save_best(None, tmp_path, 12)
    assert checkpoint.best_adapter(tmp_path) == tmp_path / "best-10"


def test_pitfall_21_two_processes_train_what_one_trains(home: Home, tmp_path: Path, content: dict[str, Any]) -> None:
    content = {**content, "lora": {"r": 4, "alpha": 8}, "train": {**content["train"], "epochs": 2}}
    train(home, content, tmp_path / "alone")

    processes = start_two(home, write_recipe(tmp_path / "recipe.yaml", content), tmp_path / "both")

    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    alone, both = weights(tmp_path / "alone"), weights(tmp_path / "both")
    assert all(abs(both[name] - alone[name]).max() < 2e-5 for name in alone)
    published = AdapterStore(home.adapters).resolve("tiny")
    assert published.version == 2
    assert (
        published.metrics["trained_tokens"] == AdapterStore(home.adapters).resolve("tiny@1").metrics["trained_tokens"]
    )


def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(
    home: Home, tmp_path: Path, content: dict[str, Any]
) -> None:
    content = {**content, "train": {**content["train"], "epochs": 400, "save_every": "never"}}

    processes = start_two(home, write_recipe(tmp_path / "recipe.yaml", content), tmp_path / "both")
    while not status(tmp_path / "both").get("step"):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)

    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [CANCELLED, CANCELLED], ends
    assert checkpoint.last_checkpoint(tmp_path / "both") is not None
    assert "and --resume" in ends[0][1]
