"""What is odd about a record is counted with its lines, and trained on all the same."""

import json
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from onebase.errors import DatasetError, InvalidInput
from onebase.prompt import PromptRenderer
from onebase.prompt_types import Example
from onebase.tokenizer import TextTokenizer
from onebase_training import inspect_data
from onebase_training.command_parts import UserErrors
from onebase_training.config import make_recipe
from onebase_training.dataset import load_dataset
from onebase_training.oddities import oddities
from onebase_training.record_parts import RecordError
from onebase_training.records import parse_record
from onebase_training.rows import Encoder

ASK = {"role": "user", "content": "Hi"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
SAY = {"role": "assistant", "content": "Ho"}


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([ASK, SAY], []),
        ([{"role": "system", "content": "Be."}, ASK, SAY], []),
        ([SAY, ASK, SAY], ["start with an answer"]),
        ([ASK, ASK, SAY], ["have two user turns"]),
        ([ASK, SAY, SAY], ["have two answers"]),
        ([ASK, SAY, ASK], ["end with a turn that no answer follows"]),
        ([{"role": "user", "content": " "}, SAY], ["have a turn without text"]),
        ([ASK, {"role": "assistant", "content": ""}], ["have an empty answer"]),
        ([ASK, {"role": "assistant", "content": "", "weight": 0}, ASK, SAY], []),
        ([ASK, SAY, {"role": "system", "content": "Be."}, ASK, SAY], ["have a system turn that is not the first"]),
        (
            [ASK, CALL, {"role": "tool", "content": "1"}, SAY],
            [],
        ),
    ],
)
def test_an_odd_conversation_is_said_to_be_so(messages: list[dict[str, Any]], found: list[str]) -> None:
    told = oddities(parse_record({"messages": messages}, "auto"))

    assert len(told) == len(found)
    assert all(text.startswith(start) for text, start in zip(told, found, strict=True))


def test_data_check_counts_them_with_their_lines(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    lines = [[ASK, SAY], [SAY], [ASK, ASK, SAY], [SAY], [{"role": "user"}, SAY]] + [[SAY]] * 20
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in lines))
    recipe = make_recipe({"name": "x", "data": {"train": str(file)}})

    report = inspect_data.check_file(recipe, encoder, 2048)

    told = {entry["message"].split(" that")[0]: entry for entry in report.as_json()["odd"]}
    assert told["start with an answer"]["count"] == 22
    assert told["start with an answer"]["lines"] == [2, 4, *range(6, 14)]
    assert told["have two user turns in a row"]["lines"] == [3]
    assert [(p.line, p.text) for p in report.file.problems] == [(5, "messages[0].content is missing")]
    assert (report.file.broken, len(report.lengths), len(report.shown)) == (1, 24, 1)


def test_a_kept_unknown_speaker_is_told_as_the_seed_warned(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    turns = [{"from": "judge", "value": "Order"}, {"from": "gpt", "value": "Hi"}]
    file.write_text(json.dumps({"conversations": turns}))
    data = {"train": str(file), "eval_fraction": 0}

    kept = load_dataset(make_recipe({"name": "x", "data": data | {"unknown_role": "keep"}}), encoder, 2048)

    assert kept.notices == [
        f"{file}: 1 of 1 records have an unknown speaker, kept under a header of its own (first on line 1)"
    ]
    with pytest.raises(InvalidInput, match=r"line 1: conversations\[0\].from: unknown speaker 'judge'"):
        load_dataset(make_recipe({"name": "x", "data": data}), encoder, 2048)


class SkipsTheFirst:
    """A renderer whose template shows the first answer differently in a history than it prompts for."""

    def render_example(self, messages: Any, tools: Any) -> Example:
        return Example([1, 2, 3, 4], [False, False, False, True], (1,))


def test_answers_that_a_template_changes_are_told_as_not_learnt(tmp_path: Path, legacy: TextTokenizer) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"messages": [ASK, SAY, ASK, SAY]}))
    encoder = Encoder(legacy, cast("PromptRenderer", SkipsTheFirst()))

    dataset = load_dataset(make_recipe({"name": "x", "data": {"train": str(file), "eval_fraction": 0}}), encoder, 2048)

    assert dataset.notices == [
        f"{file}: 1 of 1 records have answers that the chat template does not write as given: those are not learnt"
    ]


def test_what_a_file_says_is_no_markup(tmp_path: Path) -> None:
    out = StringIO()

    with pytest.raises(typer.Exit), UserErrors(Console(file=out, width=200)):
        raise DatasetError("d.jsonl", ["line 1: unknown role '[/red]'", "line 2: unknown role '[bold]'"])

    assert out.getvalue() == "error: line 1: unknown role '[/red]'\nerror: line 2: unknown role '[bold]'\n"


KEYS = (
    "messages conversations instruction input output system_prompt question response prompt completion text role "
    "content from value weight name tools functions tool_calls tool_call_id function_call function arguments "
    "parameters description type refusal id"
).split()
TEXTS = st.sampled_from(["user", "assistant", "gpt", "human", "text", "f", "", "\ud800", "{}", "</s>"]) | st.text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "function"])},
        optional={key: VALUES for key in ("content", "weight", "name", "tool_calls", "function_call", "refusal")},
    ),
    max_size=3,
)
RECORDS = VALUES | st.fixed_dictionaries({"messages": MESSAGES}, optional={"tools": VALUES, "functions": VALUES})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=RECORDS)
def test_any_json_value_becomes_a_row_or_an_error_that_says_why(record: Any, encoder: Encoder) -> None:
    try:
        parsed = parse_record(record, "auto")
        row = encoder.encode(parsed)
    except (RecordError, InvalidInput):
        return
    assert len(row.ids) == len(row.learnt)
    assert all(oddities(parsed))
