"""Runs that are asked to stop, by Ctrl-C or SIGTERM: wherever it comes, work is kept, and the way on is told."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from onebase.home import Home
from onebase.store import AdapterStore
from onebase_training import checkpoint, trainer
from onebase_training.trainer import StepDataset
from tiny_base import write_recipe
from training_runs import assert_equal_bits, signal_at_step, start, started_two, status, train, weights

pytestmark = pytest.mark.slow

CANCELLED = 130
MANY = 4000
"""Epochs of milliseconds: minutes, so that no run ends by itself before its test has looked at it."""


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
    content["train"] |= {"epochs": MANY, "save_every": "never"}
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


def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(
    home: Home, tmp_path: Path, content: dict[str, Any]
) -> None:
    content = {**content, "train": {**content["train"], "epochs": MANY, "save_every": "never"}}

    with started_two(home, write_recipe(tmp_path / "recipe.yaml", content), tmp_path / "both") as processes:
        while not status(tmp_path / "both").get("step"):
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [CANCELLED, CANCELLED], ends
    assert checkpoint.last_checkpoint(tmp_path / "both") is not None
    assert "and --resume" in ends[0][1]
