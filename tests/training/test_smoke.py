"""A version speaks before it is published: one that overflows, or has learnt to say nothing, stays out of the store."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from onebase.base_model import load_base
from onebase.bases import resolve_base
from onebase.errors import TrainingError
from onebase.home import Home
from onebase.store import AdapterStore
from onebase.tokenizer import TextTokenizer
from onebase_training.assemble import prepare, read_data
from onebase_training.config import make_recipe
from onebase_training.smoke import PROMPTS, TOKENS, check_speaks
from onebase_training.status import StatusWriter
from onebase_training.train import Run, carry_out
from tiny_base import NAME, recipe, sharegpt_file

pytestmark = pytest.mark.slow


def test_a_sound_model_says_a_few_tokens_and_one_that_overflows_is_told(home: Home, tmp_path: Path) -> None:
    asked = make_recipe(recipe(sharegpt_file(tmp_path / "data.jsonl")))
    spec = resolve_base(home, NAME)
    rows = [row for row, _ in read_data(asked, spec, TextTokenizer.load(spec.path)).train]
    model = prepare(load_base(spec, compute_dtype="float32"), asked).model
    answers = check_speaks(model, rows, end_ids=())
    assert [len(answer) for answer in answers] == [TOKENS] * PROMPTS

    with pytest.raises(TrainingError, match="3 of 3 answers before their first word"):
        check_speaks(model, rows, end_ids=range(model.config.vocab_size))

    for name, weight in model.named_parameters():
        if ".lora_B." in name:  # finite, and written without complaint
            torch.nn.init.constant_(weight, 1e30)
    with pytest.raises(TrainingError, match="not finite"):
        check_speaks(model, rows, end_ids=())


def test_a_run_that_teaches_to_say_nothing_fails_and_publishes_nothing(home: Home, tmp_path: Path) -> None:
    silent = [[("human", f"Hello {number}"), ("gpt", "")] for number in range(12)]
    content = recipe(
        sharegpt_file(tmp_path / "silent.jsonl", silent), train={"epochs": 12}, data={"eval_fraction": 0.0}
    )
    status = tmp_path / "run/status.json"

    with pytest.raises(TrainingError, match="nothing published"):
        carry_out(Run(make_recipe(content), home, tmp_path / "run", StatusWriter(status), Console(quiet=True)))

    told = json.loads(status.read_text())
    assert (told["state"], told["version"], told["error"]["code"]) == ("failed", None, "smoke_test_failed")
    assert AdapterStore(home.adapters).list() == []
