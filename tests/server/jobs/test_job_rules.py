"""The rules that need no process: names, hyperparameters, the gate's judgement, what is read of a trainer's events."""

import json
from pathlib import Path
from typing import Any

import pytest

from onebase_server.jobs.gate import Measured, judge, read_measured
from onebase_server.jobs.hyperparameters import decided, to_recipe
from onebase_server.jobs.names import adapter_name, tuned_name
from onebase_server.jobs.orders import Gate
from onebase_server.jobs.progress import EventsTail, Notice, StepMetrics
from onebase_server.jobs.results import results_csv
from onebase_server.jobs.run_folder import RunFolder, to_status


@pytest.mark.parametrize(
    ("examples", "epochs"), [(10, 10), (4, 25), (33, 3), (34, 3), (100, 3), (8333, 3), (8334, 2), (30_000, 1)]
)
def test_auto_epochs_follow_openais_cookbook(examples: int, epochs: int) -> None:
    assert decided({}, examples)["n_epochs"] == epochs


def test_what_was_asked_for_stays_and_the_rest_is_decided() -> None:
    found = decided({"n_epochs": 7, "batch_size": "auto", "learning_rate_multiplier": 0.5}, 300)
    assert found == {"n_epochs": 7, "batch_size": 8, "learning_rate_multiplier": 0.5}
    assert to_recipe(found) == {"epochs": 7.0, "batch_size": 8, "learning_rate": 1e-4}


def test_names_are_openais_and_fit_the_store() -> None:
    job = "ftjob-0123456789abcdef01234567"
    assert tuned_name("open/llama 7b", "My Bot!", job) == "ft:open/llama-7b:onebase:my-bot:01234567"
    assert tuned_name("base", None, job) == "ft:base:onebase::01234567"
    assert adapter_name("org/Base", None, job) == "base-01234567"
    long = adapter_name("base", "ünï " * 40, job)
    assert len(long) <= 64
    assert long.endswith("-01234567")
    assert adapter_name("//", "!", job) == "adapter-01234567"


NOW = Measured("bot@1", 1.0, 0.9, 10)


@pytest.mark.parametrize(
    ("candidate", "passed"),
    [
        (Measured("bot@2", 1.02, 0.9, 10), True),
        (Measured("bot@2", 1.03, 0.9, 10), False),
        (Measured("bot@2", 0.5, 0.85, 10), True),
        (Measured("bot@2", 0.5, 0.84, 10), False),
        (Measured("bot@2", 0.5, None, 10), True),
        (Measured("bot@2", float("nan"), 0.9, 10), False),
        (Measured("bot@2", 0.5, float("nan"), 10), False),
    ],
    ids=str,
)
def test_the_gate_holds_within_its_margins_only(candidate: Measured, passed: bool) -> None:
    verdict = judge(Gate(), candidate, NOW)
    assert verdict.passed is passed
    assert passed or "bot@2 was not published" in verdict.reason
    json.dumps(verdict.report(), allow_nan=False)


def test_a_first_version_has_nothing_to_be_worse_than_but_must_be_finite() -> None:
    assert judge(Gate(), Measured("bot@1", 9.0, 0.0, 10), None).passed
    assert not judge(Gate(), Measured("bot@1", float("inf"), 1.0, 10), None).passed


def test_the_verdict_says_both_figures_and_a_current_version_without_any_holds_nobody_up() -> None:
    reason = judge(Gate(), Measured("bot@2", 1.5, 0.5, 10), NOW).reason
    assert "its response loss 1.5000 is more than 0.02 above the current version's 1.0000" in reason
    assert "50% of its answers end by themselves, more than 5% below the current version's 90%" in reason
    broken = Measured("bot@1", float("nan"), float("nan"), 10)
    verdict = judge(Gate(), Measured("bot@2", 1.5, 0.5, 10), broken)
    assert verdict.passed
    json.dumps(verdict.report(), allow_nan=False)
    assert verdict.report()["current"] == {"version": "bot@1", "loss": None, "stop_rate": None, "examples": 10}


def test_measurements_are_read_by_version_and_broken_files_are_none(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    assert read_measured(path) == {}
    path.write_text('{"models": [{"model": "a@1", "response_loss": 1.5, "stop_rate": null, "examples": 3}], "x": 1}')
    assert read_measured(path) == {"a@1": Measured("a@1", 1.5, None, 3)}
    for broken in ('{"models": [{"model": "a@1"}]}', "{", "[]", '{"models": 1}'):
        path.write_text(broken)
        assert read_measured(path) == {}


def test_events_are_read_as_they_come_and_half_lines_wait(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventsTail(path)
    assert tail.new() == []
    first = {"type": "metrics", "step": 1, "total_steps": 2, "train_loss": 2.0, "grad_norm": None, "epoch": 0.5}
    path.write_text(json.dumps(first) + '\nnonsense\n{"type": "notice", "message": "1 row left out"}\n{"type": "metr')
    assert tail.new() == [StepMetrics(1, 2, {"train_loss": 2.0}), Notice("1 row left out")]
    with path.open("a") as file:
        file.write('ics", "step": 2, "total_steps": 2, "train_loss": NaN, "train_mean_token_accuracy": 0.5}\n')
    assert tail.new() == [StepMetrics(2, 2, {"train_mean_token_accuracy": 0.5})]
    assert tail.new() == []


def test_the_result_table_has_the_last_word_on_each_step() -> None:
    told = [
        StepMetrics(2, 2, {"train_loss": 9.0}),
        StepMetrics(1, 2, {"train_loss": 2.0, "train_mean_token_accuracy": 0.25}),
        StepMetrics(2, 2, {"train_loss": 1.0}),
        StepMetrics(2, 2, {"full_valid_loss": 1.5, "full_valid_mean_token_accuracy": 0.75}),
    ]
    assert results_csv(told).decode().splitlines()[1:] == ["1,2.00000,0.25000,,", "2,1.00000,,1.50000,0.75000"]


@pytest.mark.parametrize("values", [{}, {"step": "3", "loss": "x", "version": 7, "error": "no", "eta_s": 1e999}])
def test_a_status_of_wrong_types_is_as_good_as_none(values: dict[str, Any]) -> None:
    assert to_status(values) == to_status({})


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/srv/home/runs/ftjob-1/training.jsonl line 3: no role", "training.jsonl line 3: no role"),
        ("/srv/home/runs/ftjob-1/dataset/a.jsonl: empty", "dataset/a.jsonl: empty"),
        ("No such file: '/home/me/models/base/config.json'", "No such file: 'config.json'"),
        ("adapter at /srv/home/adapters/bot/versions/2 refused: rank 65", "adapter at 2 refused: rank 65"),
        ("see https://example.org/a/b for ft:org/base:onebase::1 and/or org/base", None),
        ("3/4 of /tmp is full", None),
    ],
)
def test_what_is_shown_of_a_processs_words_names_no_folder(said: str, shown: str | None) -> None:
    folder = RunFolder(Path("/srv/home/runs"), "ftjob-1")
    assert folder.told(said) == (shown or said)
    status = to_status({"message": said, "error": {"code": "x", "message": said}}, folder.told)
    assert status.message == (shown or said)
    assert status.error == {"code": "x", "message": shown or said}


def test_the_lock_says_whether_a_run_is_alive(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "ftjob-1")
    folder.create()
    assert not folder.is_alive()
    with folder.locked() as first:
        assert first is not None
        assert folder.is_alive()
        with folder.locked() as second:
            assert second is None
    assert not folder.is_alive()
