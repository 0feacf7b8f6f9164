"""Every line format becomes the same conversation; every wrong record says what to mend."""

from typing import Any

import pytest

from onebase.messages import Message, Tool, ToolCall
from onebase_training.record_parts import RecordError
from onebase_training.records import Conversation, PlainText, parse_record

SAY = {"role": "assistant", "content": "x"}
ASKED = (Message("user", "Hi"), Message("assistant", "Ho"))


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Ho"},
            ]
        },
        {"instruction": "Hi", "input": "", "output": "Ho"},
        {"prompt": "Hi", "completion": "Ho"},
    ],
    ids=["sharegpt", "openai", "openai_parts", "alpaca", "completion"],
)
def test_a_format_is_recognised_by_its_keys(record: dict[str, Any]) -> None:
    assert parse_record(record, "auto") == Conversation(ASKED)


def test_alpacas_input_stands_below_its_instruction() -> None:
    record = parse_record({"instruction": "Add", "input": "1 2", "output": "3"}, "auto")

    assert isinstance(record, Conversation)
    assert record.messages[0].content == "Add\n\n1 2"


def test_a_plain_text_stays_one() -> None:
    assert parse_record({"text": "Once"}, "auto") == PlainText("Once")


def test_weights_tools_and_tool_calls_are_kept() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    record = parse_record(
        {
            "messages": [
                {"role": "user", "content": "Look"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "seen"},
                {"role": "assistant", "content": "bad", "weight": 0},
                {"role": "assistant", "content": "good", "weight": 1},
            ],
            "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
        },
        "auto",
    )

    assert isinstance(record, Conversation)
    assert record.tools == (Tool("look", "", {"type": "object"}),)
    assert record.messages[1].tool_calls == (ToolCall("c1", "look", '{"at": 1}'),)
    assert [m.is_supervised for m in record.messages] == [False, True, False, False, True]


def test_a_tool_call_whose_arguments_are_an_object_is_written_as_json() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
    record = parse_record({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}, "auto")

    assert isinstance(record, Conversation)
    assert record.messages[0].tool_calls[0].arguments == '{"a": 1}'


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ([1], "a record must be a JSON object, not list"),
        ({"a": 1}, "unknown format (keys a)"),
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role: unknown role 'usr'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be a string, not int"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message to learn from"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "no assistant message to learn from"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "messages[0].weight must be 0 or 1"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight is only for assistant"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts of type text"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] must be an object with from and value"),
        ({"conversations": [{"from": "judge", "value": "x"}]}, "unknown speaker 'judge'"),
        ({"prompt": 1, "completion": "x"}, "prompt must be a string, not int"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls must be a list, not int"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": 5}, "tools must be a list, not int"),
        ({"messages": [{"role": "assistant", "content": "x"}], "functions": {}}, "functions must be a list, not dict"),
        ({"messages": [{"role": "assistant", "content": "x", "name": 5}]}, "messages[0].name must be a string"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "tools": [{"function": {"name": "f\udfff"}}]},
            "tools[0].function.name holds half of a surrogate pair",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "\ud800"}}]}]},
            "messages[0].tool_calls[0].function.arguments holds half",
        ),
        (
            {"messages": [SAY], "tools": [{"function": {"name": "f", "parameters": [1]}}]},
            "tools[0].function.parameters must be a JSON Schema object",
        ),
    ],
)
def test_a_wrong_record_says_where_and_what(record: object, word: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(record, "auto")
    assert word in str(caught.value)


def test_openais_other_keys_do_not_disturb_and_arguments_keep_their_letters() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "ä"}}}
    record = parse_record(
        {
            "messages": [
                {"role": "user", "content": "Hi", "name": "anna"},
                {"role": "assistant", "content": None, "tool_calls": [call], "annotations": []},
                {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "1"}]},
                {"role": "assistant", "content": "Ho", "weight": 1.0, "audio": None},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "strict": True}}],
            "parallel_tool_calls": False,
            "functions": None,
        },
        "auto",
    )

    assert isinstance(record, Conversation)
    assert record.messages[0].name == "anna"
    assert record.messages[1].tool_calls[0].arguments == '{"a": "ä"}'
    assert record.messages[3].is_supervised


def test_a_given_format_wins_over_the_keys_and_names_what_is_missing() -> None:
    with pytest.raises(RecordError, match="conversations missing"):
        parse_record({"messages": []}, "sharegpt")
