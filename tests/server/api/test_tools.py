"""Tools: they reach the prompt, calls come back in OpenAI's form, and a stream shows a call only as a call."""

import json
from typing import Any

import pytest

from api_world import World, error_of, text_of
from onebase.messages import Message, ToolCall
from onebase.prompt import HumanResponseRenderer
from onebase_server.api.tool_calls import CallWatch
from onebase_server.engine.runner import SampleRow

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks a thing up.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
PUT = {"type": "function", "function": {"name": "put"}}
CALL = '### CALL:\n{"name": "look", "arguments": {"q": "tea"}}'
TWO = CALL + '\n{"name": "put", "arguments": {}}'


@pytest.fixture
def world(obedient_world: World) -> World:
    """Its model obeys the engine's masks, as a real sampler does."""
    obedient_world.says = "Hello there."
    return obedient_world


def message_of(world: World, **fields: Any) -> tuple[dict[str, Any], str]:
    reply = world.chat(**{"tools": [LOOK, PUT], **fields})
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


def test_a_call_comes_back_as_openai_writes_it(world: World) -> None:
    world.says = CALL
    message, finish = message_of(world)
    assert finish == "tool_calls"
    assert message["content"] is None
    [call] = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]["name"]) == ("function", "look")
    assert json.loads(call["function"]["arguments"]) == {"q": "tea"}


def test_text_before_a_call_stays_content(world: World) -> None:
    world.says = "Let me see.\n\n" + CALL
    message, finish = message_of(world)
    assert (message["content"], finish, len(message["tool_calls"])) == ("Let me see.", "tool_calls", 1)


def test_several_calls_have_ids_of_their_own(world: World) -> None:
    world.says = TWO
    message, _ = message_of(world)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["look", "put"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_no_call_leaves_the_key_out(world: World) -> None:
    message, finish = message_of(world)
    assert "tool_calls" not in message
    assert (message["content"], finish) == ("Hello there.", "stop")


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": None}, {"tools": []}], ids=str)
def test_without_tools_or_with_none_there_are_no_calls(world: World, fields: dict[str, Any]) -> None:
    world.says = CALL
    message, finish = message_of(world, **fields)
    assert "tool_calls" not in message
    assert (message["content"], finish) == (CALL, "stop")


def test_a_call_cut_by_the_limit_is_not_a_call(world: World) -> None:
    world.says = CALL
    message, finish = message_of(world, max_tokens=30)
    assert (message["content"], finish) == (CALL[:30], "length")


def test_tools_calls_and_results_reach_the_prompt(world: World) -> None:
    world.runner.batches.clear()
    world.runner.keep_batches = True
    message_of(
        world,
        messages=[
            {"role": "user", "content": "Tea?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"q": "tea"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c", "content": "4 pounds"},
        ],
    )
    world.runner.keep_batches = False
    prompt = bytes(token for token in world.runner.batches[-1].rows[0].prompt_ids if token < 256).decode()
    assert "Looks a thing up." in prompt
    assert CALL in prompt
    assert "### TOOL:\n4 pounds" in prompt


SAYINGS = {
    "call": CALL,
    "text and call": "Let me see.\n\n" + CALL,
    "two calls": TWO,
    "text": "Hello there.",
    "almost a call": "Use ### CALLS, not ### CAL",
    "a broken call": '### CALL:\n{"name": 5}',
    "a header in the text": "Look:\n#### CALL:\nis a header",
    "a call of no such tool": '### CALL:\n{"name": "steal", "arguments": {}}',
    "a call in prose": "### CALL: me",
    "a call behind one line break": 'Well:\n### CALL:\n{"name": 5}',
    "ends by line breaks": "Hello\n\n",
    "hashes": "# A\n\n## B\n\n### C",
    "empty": "",
}


@pytest.mark.parametrize("says", SAYINGS.values(), ids=SAYINGS)
def test_a_stream_says_what_the_whole_reply_says(world: World, says: str) -> None:
    world.says = says
    whole, finish = message_of(world)
    chunks = world.chunks(tools=[LOOK, PUT])
    assert text_of(chunks) == (whole["content"] or "")
    assert chunks[-1]["choices"][0]["finish_reason"] == finish
    calls = calls_of(chunks)
    assert [(call["name"], call["arguments"]) for call in calls] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in whole.get("tool_calls", [])
    ]


MISUSES = {
    "no such tool": '### CALL:\n{"name": "steal", "arguments": {}}',
    "no name": '### CALL:\n{"name": 5}',
    "no JSON": "### CALL:\nlook for tea",
    "wrong arguments": '### CALL:\n{"name": "look", "arguments": {"q": 5}}',
    "arguments that are no object": '### CALL:\n{"name": "look", "arguments": "tea"}',
    "text behind the header": "### CALL: tea",
    "blank lines": "### CALL:\n\n\n",
    "text behind a call": CALL + "\n\nThat was it.",
    "text first": "Let me see.\n\n### CALL:\nlook",
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("says", MISUSES.values(), ids=MISUSES)
def test_once_a_call_is_opened_it_is_one_whatever_the_model_wants(world: World, says: str, stream: bool) -> None:
    world.says = says
    if stream:
        chunks = world.chunks(tools=[LOOK, PUT])
        calls, finish, content = calls_of(chunks), chunks[-1]["choices"][0]["finish_reason"], text_of(chunks)
    else:
        message, finish = message_of(world)
        calls, content = [call["function"] for call in message["tool_calls"]], message["content"] or ""
    assert finish == "tool_calls"
    assert content == ("Let me see." if says.startswith("Let") else "")
    for call in calls:
        assert call["name"] in ("look", "put")
        arguments = json.loads(call["arguments"])
        assert isinstance(arguments, dict)
        assert isinstance(arguments.get("q", ""), str)


def test_free_text_has_no_masks(own_world: World) -> None:
    own_world.says = "### Tea\n\n#### CALL: me\n\nHello"
    masked: list[bool] = []
    wants = own_world.runner._next_token

    def watch(row: SampleRow, digest: str | None, summary: int) -> int:
        masked.append(row.mask is not None)
        return wants(row, digest, summary)

    own_world.runner._next_token = watch  # type: ignore[method-assign]
    message, _ = message_of(own_world)
    assert message["content"] == "### Tea\n\n### CALL: me\n\nHello"
    assert masked
    assert not any(masked)


def test_a_stop_string_ends_text_but_no_call(world: World) -> None:
    world.says = '### CALL:\n{"name": "look", "arguments": {"q": "tea ### HUMAN: END"}}'
    message, finish = message_of(world, stop=["END"])
    assert finish == "tool_calls"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"q": "tea ### HUMAN: END"}
    world.says = "Tea. END ### CALL:"
    message, finish = message_of(world, stop=["END"])
    assert (message["content"], finish) == ("Tea. ", "stop")


@pytest.mark.parametrize("stop", ["END", "#", "CALL", "{"])
@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"response_format": {"type": "json_object"}},
    ],
    ids=["required", "named", "answer or call"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_no_call_that_the_grammar_rules_from_the_start(
    world: World, fields: dict[str, Any], stop: str, stream: bool
) -> None:
    world.says = '### CALL:\n{"name": "look", "arguments": {"q": "tea END"}}'
    if stream:
        chunks = world.chunks(tools=[LOOK, PUT], stop=[stop], **fields)
        [call], finish, content = calls_of(chunks), chunks[-1]["choices"][0]["finish_reason"], text_of(chunks)
    else:
        message, finish = message_of(world, stop=[stop], **fields)
        call, content = message["tool_calls"][0]["function"], message["content"] or ""
    assert (json.loads(call["arguments"]), finish, content) == ({"q": "tea END"}, "tool_calls", "")


def test_a_stop_string_ends_json_that_could_have_been_a_call(world: World) -> None:
    world.says = '{"a": "tea END"}'
    message, finish = message_of(world, stop=["END"], response_format={"type": "json_object"})
    assert (message["content"], finish) == ('{"a": "tea ', "stop")


UNENFORCEABLE: dict[str, Any] = {"type": "object", "properties": {"q": {"not": {"type": "string"}}}}


@pytest.mark.parametrize("strict", [None, False, True])
def test_a_schema_that_cannot_be_kept_is_refused_if_strict_and_else_any_object_will_do(
    world: World, strict: bool | None
) -> None:
    world.says = '### CALL:\n{"name": "odd", "arguments": {"q": 5}}'
    odd = {"type": "function", "function": {"name": "odd", "parameters": UNENFORCEABLE, "strict": strict}}
    reply = world.chat(tools=[LOOK, odd])
    if strict:
        assert (reply.status_code, error_of(reply)["param"]) == (400, "tools[1].function.parameters")
    else:
        [call] = reply.json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"q": 5}


def test_with_a_response_format_the_answer_is_json_or_a_call(world: World) -> None:
    shape = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": shape}}
    world.says = '{"a": 5}'
    message, finish = message_of(world, response_format=wanted)
    assert (json.loads(message["content"]), finish) == ({"a": 5}, "stop")
    world.says = CALL
    message, finish = message_of(world, response_format=wanted)
    assert (message["content"], finish) == (None, "tool_calls")
    world.says = "Hello"
    message, _ = message_of(world, response_format=wanted)
    assert "tool_calls" in message or isinstance(json.loads(message["content"]), dict)


def calls_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls put together as clients do it: the head makes one, later pieces add to its arguments."""
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for delta in chunk["choices"][0]["delta"].get("tool_calls", []):
            function = delta["function"]
            if "id" in delta:
                assert delta["index"] == len(calls)
                assert delta["type"] == "function"
                assert function["arguments"] == ""
                calls.append({"id": delta["id"], "name": function["name"], "arguments": ""})
            else:
                assert set(delta) == {"index", "function"}
                calls[delta["index"]]["arguments"] += function["arguments"]
    return calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("says", SAYINGS.values(), ids=SAYINGS)
def test_text_is_shown_alike_however_it_is_cut(says: str, size: int) -> None:
    from fakes import FakeTokenizer

    parse = HumanResponseRenderer(FakeTokenizer()).parse_text  # type: ignore[arg-type]
    watch = CallWatch("### CALL:", parse)
    shown = "".join(watch.feed(says[i : i + size]) for i in range(0, len(says), size))
    rest, calls = watch.finish()
    assert shown + rest == parse(says).content
    assert calls == parse(says).tool_calls
    assert "### CALL:" not in shown or "#### CALL:" in says


def test_text_that_cannot_be_a_call_is_not_held_back() -> None:
    watch = CallWatch("### CALL:", lambda text: Message("assistant", text))
    assert watch.feed("Hello") == "Hello"
    assert watch.feed(" there\n") == " there"
    assert watch.feed("you") == "\nyou"


def test_a_format_without_calls_holds_nothing_back() -> None:
    watch = CallWatch("", lambda text: Message("assistant", text, tool_calls=(ToolCall("c", "f", "{}"),)))
    assert watch.feed("### CALL:") == "### CALL:"
