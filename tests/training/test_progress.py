"""What a run shows step by step: loss, speed and time left, however seldom the curves are written."""

import json
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from onebase_training.config import TrainConfig
from onebase_training.plan import Plan
from onebase_training.progress import RunCallback
from onebase_training.status import StatusWriter
from onebase_training.stop import StopRequest

pytestmark = pytest.mark.slow


@dataclass
class FakeTrainer:
    """What the callback asks of a trainer."""

    last_loss: float = 3.25
    trained_tokens: int = 0
    stops: bool = False
    state: TrainerState = field(default_factory=TrainerState)


def callback(tmp_path: Path, console: Console) -> RunCallback:
    plan = Plan(tuple((k,) for k in range(40)), (40,), 1.0)
    made = RunCallback(
        plan, TrainConfig(log_every=20), StatusWriter(tmp_path / "status"), console, StopRequest(), has_eval=False
    )
    made.trainer = FakeTrainer()
    return made


def test_the_status_file_follows_every_step_though_curves_are_written_every_twenty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StatusWriter, "MIN_INTERVAL_S", 0.0)
    shown = callback(tmp_path, Console(quiet=True))
    state, control = TrainerState(), TrainerControl()
    shown.on_train_begin(None, state, control)
    for step in (1, 2, 3):
        shown.trainer.trained_tokens += 100
        shown.trainer.last_loss = 4.0 / step
        state.global_step = step
        shown.on_step_end(None, state, control)

    told = json.loads((tmp_path / "status").read_text())
    assert (told["step"], told["total_steps"], told["loss"]) == (3, 40, 4.0 / 3)
    assert told["tokens_per_s"] > 0
    assert told["eta_s"] is not None
    assert not control.should_log


def test_the_bar_has_loss_and_time_left_after_the_first_step_and_moves_within_a_step(tmp_path: Path) -> None:
    screen = StringIO()
    shown = callback(tmp_path, Console(file=screen, force_terminal=True, width=120))
    state, control = TrainerState(), TrainerControl()
    shown.on_train_begin(None, state, control)
    shown.on_part(0, 0.5, 7.5)
    assert shown._bar.tasks[0].completed == 0.5
    assert shown._bar.tasks[0].fields["loss"] == "7.500", "of the first half of the first step"
    state.global_step, shown.trainer.trained_tokens = 1, 100

    shown.on_step_end(None, state, control)
    shown.close()

    last = screen.getvalue().rpartition("step")[2]
    assert "1/40" in last
    assert "loss 3.250" in last
    assert "tok/s" in last
    assert " left" in last
    assert "--:--" not in last


def test_without_a_terminal_there_is_a_line_now_and_then_and_not_one_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("onebase_training.progress.time.monotonic", lambda: now)
    log = StringIO()
    shown = callback(tmp_path, Console(file=log, width=120))
    state, control = TrainerState(), TrainerControl()
    shown.on_train_begin(None, state, control)
    for step in range(1, 41):
        now += 3.0
        state.global_step = step
        shown.on_step_end(None, state, control)

    lines = log.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/40" for step in (*range(1, 40, 4), 40)]
    assert "loss 3.250" in lines[0]
    assert lines[1].endswith("01:45 left")
