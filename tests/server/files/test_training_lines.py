"""A training file is judged line by line, in OpenAI's words, and the first wrong line is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from onebase_server.jobs.training_lines import FileProblem, FileReport, check_training_file, find_broken_line

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ahoy"}


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(
        b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)
    )
    return path


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def problem_with(path: Path, tenth: Any) -> str:
    """What is said of a file whose last line of ten is `tenth`."""
    found = check_training_file(write(path, *[chat(USER, ANSWER)] * 9, tenth))
    assert isinstance(found, FileProblem)
    assert found.code == "invalid_training_file"
    return found.message.removeprefix("The job failed due to an invalid training file. Invalid file format. ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (chat({"role": "system", "content": "Be brief"}, USER, ANSWER), FileReport("chat", 10)),
        (chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}), FileReport("chat", 10)),
        (chat(USER, {"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "x"}, ANSWER, tools=[]),
         FileReport("chat", 10)),
        (chat({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER), FileReport("chat", 10)),
        ({"prompt": "2+2=", "completion": "4"}, FileReport("completion", 10)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}]},
         FileReport("sharegpt", 10)),
    ],
)  # fmt: skip
def test_files_of_every_offered_form_pass(path: Path, line: Any, report: FileReport) -> None:
    assert check_training_file(write(path, *[line] * 10)) == report


def test_a_byte_order_mark_and_blank_lines_do_no_harm(path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(chat(USER, ANSWER)).encode(), b"", *[chat(USER, ANSWER)] * 9, b"  "]
    assert check_training_file(write(path, *lines)) == FileReport("chat", 10)


@pytest.mark.parametrize(
    ("tenth", "message"),
    [
        (chat(USER, {"content": "Hi"}), "Example 10, message 2 Discriminator 'role' is missing in value"),
        (chat(USER, {"role": "robot", "content": "x"}), "Example 10, message 2 has the unrecognized role 'robot'"),
        (chat(USER, {**ANSWER, "wieght": 1}), "Example 10, message 2 has the unrecognized key 'wieght'"),
        (chat({**USER, "weight": 1}, ANSWER), "message 1 has a weight, which only assistant messages may have"),
        (chat(USER, {**ANSWER, "weight": 2}), "message 2 has a weight that is neither 0 nor 1"),
        (chat(USER, {**ANSWER, "weight": True}), "message 2 has a weight that is neither 0 nor 1"),
        (chat(USER, {"role": "assistant"}), "message 2 is missing content"),
        (chat(USER, {"role": "assistant", "content": 7}), "neither a string nor text parts"),
        (chat(USER), "there must be at least one message from the assistant"),
        (chat(USER, ANSWER, USER), "the last message must be from the assistant"),
        (chat(USER, {**ANSWER, "weight": 0}), "nothing to learn"),
        (chat(), "at least one message"),
        (chat(USER, ANSWER, tools={}), "tools must be a list"),
        ({"prompt": "a", "completion": "b"}, "Example 10, messages must be a list"),
        (b"{", "Line 10 is not valid JSON"),
        (b"[1]", "Line 10 is not a JSON dictionary"),
        (b'{"a": "\xff"}', "Line 10 is not valid UTF-8"),
        (b"[" * 100_000, "Line 10 is not valid JSON"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(path: Path, tenth: Any, message: str) -> None:
    assert message in problem_with(path, tenth)


def test_the_line_is_named_too_where_blank_lines_make_it_differ_from_the_example(path: Path) -> None:
    found = check_training_file(write(path, b"", *[chat(USER, ANSWER)] * 9, chat(USER)))
    assert isinstance(found, FileProblem)
    assert "Example 10 (line 11), there must be" in found.message


def test_too_few_examples_are_refused_in_openais_words(path: Path) -> None:
    found = check_training_file(write(path, *[chat(USER, ANSWER)] * 3))
    assert found == FileProblem(
        "invalid_n_examples", "Training file has 3 example(s), but must have at least 10 examples"
    )
    assert check_training_file(path, kind="validation", minimum=1) == FileReport("chat", 3)


def test_preference_data_and_unknown_forms_are_told_apart(path: Path) -> None:
    preference = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}
    found = check_training_file(write(path, *[preference] * 10))
    assert isinstance(found, FileProblem)
    assert "fine-tune-preference format" in found.message
    found = check_training_file(write(path, *[{"text": "x"}] * 10))
    assert isinstance(found, FileProblem)
    assert found.message == "Unexpected file format, expected either prompt/completion pairs or chat messages."


def test_the_upload_check_looks_at_json_only(path: Path) -> None:
    assert find_broken_line(write(path, {"anything": 1})) is None
    expected = "Expected file to have JSONL format, where every line is a valid JSON dictionary. "
    assert find_broken_line(write(path, {"a": 1}, b"nope")) == expected + "Line 2 is not valid JSON: Expecting value."
    assert find_broken_line(write(path)) == expected + "The file is empty."
