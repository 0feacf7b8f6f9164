"""Which checks decide about a model, and what is kept of its measurements. No torch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onebase.errors import InvalidInput
from onebase_training.config import Recipe, make_recipe
from onebase_training.eval_checks import failures, with_checks
from onebase_training.eval_reports import Measurement, keep, kept, kept_tables
from onebase_training.rows import Row

RESULT = Measurement("captain@1", 2.0, 0.6, 1.0, 0.25, {"signs": 0.9, "greets": 1.0}, 4, 40, {"signs": ["Hello"]})


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe({"name": "x", "data": {"train": "d.jsonl"}, "eval": {"checks": {"signs": "Captain$"}}})


def test_a_check_is_a_new_one_or_one_of_the_recipes_or_the_exact_answer(recipe: Recipe) -> None:
    changed, names = with_checks(recipe, ["greets=^A=hoy", "signs", "exact"])

    assert changed.eval.checks == {"signs": "Captain$", "greets": "^A=hoy"}
    assert names == ["greets", "signs", "exact"]
    assert with_checks(recipe, []) == (recipe, [])


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("sings", "there is exact, signs; or give NAME=REGEX"),
        ("a=(", "no regular expression"),
        ("exact=a", "another name"),
    ],
)
def test_a_check_that_is_none_is_told(recipe: Recipe, given: str, word: str) -> None:
    with pytest.raises(InvalidInput, match=word):
        with_checks(recipe, [given])


def test_a_model_fails_what_too_few_of_its_answers_pass() -> None:
    assert failures([RESULT], ["greets"], 1.0) == []
    assert failures([RESULT], ["signs", "exact"], 0.25) == []
    assert [str(each) for each in failures([RESULT], ["signs"], 0.95)] == [
        "captain@1 fails signs: 90.0% of the answers, at least 95.0% must pass"
    ]
    silent = replace(RESULT, exact_match=None)
    assert "no answer to check" in str(failures([silent], ["exact"], 0.0)[0])


def test_reports_are_kept_by_version_and_compared_on_the_same_conversations_only(tmp_path: Path) -> None:
    one, other = ([Row(np.array([n, 2]), np.array([False, True]))] for n in (5, 6))
    for version, loss in (("captain@10", 1.5), ("captain@9", 1.7), ("pirate@1", 3.0)):
        keep(tmp_path, [replace(RESULT, model=version, response_loss=loss)], "held.jsonl", one)
    keep(tmp_path, [replace(RESULT, response_loss=9.0, model="captain@9")], "other.jsonl", other)
    keep(tmp_path, [replace(RESULT, response_loss=1.6, model="captain@9")], "held.jsonl", one)  # again

    found = kept(tmp_path, ["captain"])

    assert [(each["model"], each["response_loss"]) for each in found if each["data"] == "held.jsonl"] == [
        ("captain@9", 1.6),
        ("captain@10", 1.5),
    ]
    assert [table.row_count for table in kept_tables(found)] in ([2, 1], [1, 2])
    assert [each["model"] for each in kept(tmp_path, ["pirate@1"])] == ["pirate@1"]
    assert len(kept(tmp_path, [])) == 4
    assert "Hello" not in "".join(file.read_text() for file in tmp_path.iterdir()), "answers are nobody's to keep"
    assert kept(tmp_path / "none", []) == []
