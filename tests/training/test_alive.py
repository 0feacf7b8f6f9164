"""Signs of life: a supervisor that kills what has fallen silent must meet no good run, however slow its steps are."""

import json
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onebase.home import Home
from onebase_training import alive, beside, trainer
from onebase_training.alive import while_working
from onebase_training.config import make_recipe
from onebase_training.evaluate import evaluate
from onebase_training.status import StatusWriter
from onebase_training.train import Run, carry_out
from tiny_base import recipe, sharegpt_file

pytestmark = pytest.mark.slow


def test_a_process_that_works_gives_signs_and_one_that_hangs_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    worked = threading.Event()
    with while_working(worked.set, every_s=0.05):
        while not worked.is_set():
            sum(range(10_000))

    looks: list[tuple[float, int, int]] = []
    signs: list[int] = []
    look = alive._work_done
    monkeypatch.setattr(alive, "_work_done", lambda: looks.append(look()) or looks[-1])
    with while_working(lambda: signs.append(len(looks)), every_s=0.05):
        # something else in this process may have worked at first
        while len(looks) < max(signs, default=0) + 5 and len(looks) < 200:
            time.sleep(0.05)
    assert len(signs) <= len(looks) - 5


def test_a_sign_of_life_changes_nothing_but_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StatusWriter(tmp_path / "status")
    writer.enter("running", "as it was", step=3)
    before = json.loads((tmp_path / "status").read_text())
    writer.alive()
    assert json.loads((tmp_path / "status").read_text()) == before, "too early to say it again"

    monkeypatch.setattr(StatusWriter, "ALIVE_S", 0.0)
    monkeypatch.setattr(StatusWriter, "MIN_INTERVAL_S", 0.0)
    writer.alive()

    after = json.loads((tmp_path / "status").read_text())
    assert after.pop("updated_at") > before.pop("updated_at")
    assert after == before


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was being done at each sign that a layer gave."""
    given: list[str] = []
    doing = [""]
    monkeypatch.setattr(beside, "_SIGN_OF_LIFE_S", 0.0)

    def told(original: Any, name: str) -> Any:
        def spied(*args: Any, **named: Any) -> Any:
            before, doing[0] = doing[0], name
            try:
                return original(*args, **named)
            finally:
                doing[0] = before

        return spied

    progress = StatusWriter.progress
    monkeypatch.setattr(StatusWriter, "progress", lambda *a, **n: (given.append(doing[0]), progress(*a, **n))[1])
    step = told(trainer.PlanTrainer.training_step, "step")
    monkeypatch.setattr(trainer.PlanTrainer, "training_step", step)
    for module in ("trainer", "train", "evaluate"):
        measured = told(trainer.held_out_metrics, "evaluation")
        monkeypatch.setattr(f"onebase_training.{module}.held_out_metrics", measured)
    monkeypatch.setattr("onebase_training.evaluate.greedy_answers", told(_greedy(), "answers"))
    return given


def _greedy() -> Any:
    from onebase_training.generate import greedy_answers

    return greedy_answers


def test_every_layer_of_a_step_an_evaluation_and_an_answer_gives_a_sign(
    home: Home, tmp_path: Path, signs: list[str]
) -> None:
    content = recipe(sharegpt_file(tmp_path / "d.jsonl"), train={"max_steps": 1, "eval_every": 1, "tokens_at_once": 64})
    status = StatusWriter(tmp_path / "status")

    carry_out(Run(make_recipe(content), home, tmp_path / "run", status, Console(file=StringIO())))

    layers = 2
    assert signs.count("step") >= 2 * layers, "forward and backward"
    assert signs.count("evaluation") >= layers
    evaluate(make_recipe(content), home, ["tiny"], max_examples=1, max_new_tokens=3, console=Console(quiet=True))
    assert signs.count("answers") >= layers
