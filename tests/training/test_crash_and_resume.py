"""Runs that end before their time: killed, on a full disk, with a damaged checkpoint. And one run on two processes."""

import errno
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.adapter import WEIGHTS
from onebase.errors import TrainingError
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_training import checkpoint
from onebase_training import train as training
from tiny_base import write_recipe
from training_runs import assert_equal_bits, start, started_two, status, train, weights

pytestmark = pytest.mark.slow


def test_pitfall_14_a_killed_run_goes_on_to_the_very_same_weights(
    home: Home, tmp_path: Path, content: dict[str, Any]
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(home, write_recipe(tmp_path / "recipe.yaml", content), killed, killed_at=8)
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    assert checkpoint.last_checkpoint(killed) == killed / "checkpoint-6"
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

    with started_two(home, write_recipe(tmp_path / "recipe.yaml", content), tmp_path / "both") as processes:
        ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    alone, both = weights(tmp_path / "alone"), weights(tmp_path / "both")
    assert all(abs(both[name] - alone[name]).max() < 2e-5 for name in alone)
    published = AdapterStore(home.adapters).resolve("tiny")
    assert published.version == 2
    assert (
        published.metrics["trained_tokens"] == AdapterStore(home.adapters).resolve("tiny@1").metrics["trained_tokens"]
    )
