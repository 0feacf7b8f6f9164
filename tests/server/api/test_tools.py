"""Tools: they reach the prompt, calls come back in OpenAI's form, and a stream shows a call only as a call."""

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from api_world import World, error_of, text_of
from fakes import FakeTokenizer
from onebase.chat_template import HERMES
from onebase.messages import Message, ToolCall
from onebase.prompt import HumanResponseRenderer
from onebase.prompt_types import CallLayout
from onebase.tokenizer import TextTokenizer
from onebase_server.api.chat_plan import ChatPlan
from onebase_server.api.chat_reply import ChatStream
from onebase_server.api.tool_calls import CallReader, Piece
from onebase_server.engine.runner import SampleRow
from onebase_server.engine.types import FinishReason, TokenEvent, TokenLogprob

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


def test_a_call_cut_before_its_arguments_is_not_a_call(world: World) -> None:
    world.says = CALL
    message, finish = message_of(world, max_tokens=30)
    assert (message["content"], finish) == (CALL[:30], "length")
    assert "tool_calls" not in message


@pytest.mark.parametrize("limit", [5, 30, 42, 48, 53, 54, 60, 85, 90])
def test_a_cut_answer_is_the_same_whole_and_streamed(world: World, limit: int) -> None:
    world.says = TWO
    fields: dict[str, Any] = {"tools": [LOOK, PUT], "max_tokens": limit, "logprobs": True}
    choice = world.chat(**fields).json()["choices"][0]
    chunks = world.chunks(**fields)
    assert text_of(chunks) == (choice["message"]["content"] or "")
    whole = [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert [{"name": call["name"], "arguments": call["arguments"]} for call in calls_of(chunks)] == whole
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"]
    assert choice["finish_reason"] == ("length" if limit <= len(TWO) else "tool_calls")
    if limit == 48:
        assert whole == [{"name": "look", "arguments": '{"q": "t'}]
    entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in entries if part for entry in part["content"]] == choice["logprobs"]["content"]


def test_a_streamed_call_comes_as_it_is_made_with_the_logprobs_of_its_text(loop: Any) -> None:
    model = SimpleNamespace(id="m", renderer=HUMAN)
    plan = SimpleNamespace(
        n=1, id="x", created=1, model=model, finds_calls=True, wants_logprobs=True, include_usage=False
    )
    stream = ChatStream(cast(ChatPlan, plan), cast(TextTokenizer, FakeTokenizer()), "fp_1")
    sent: list[str] = []

    async def tokens() -> AsyncIterator[TokenEvent]:
        for letter in CALL:
            sent.append(letter)
            yield TokenEvent(0, letter, (ord(letter),), (TokenLogprob(ord(letter), -0.5),))
        yield TokenEvent(0, finish_reason=FinishReason.STOP)

    async def watch() -> list[tuple[int, dict[str, Any]]]:
        return [
            (len(sent), json.loads(line.removeprefix(b"data: "))["choices"][0])
            async for event in stream.events(tokens())
            for line in event.split(b"\n\n")[:-1]
        ]

    (_, role), (begun, head), *pieces, (_, last), (_, finish) = loop.run_until_complete(watch())
    assert role["delta"]["role"] == "assistant"
    [call] = head["delta"]["tool_calls"]
    assert (call["index"], call["type"], call["function"]) == (0, "function", {"name": "look", "arguments": ""})
    assert call["id"].startswith("call_")
    assert begun == len('### CALL:\n{"name": "look", "arguments": ')
    arguments = [piece["delta"]["tool_calls"] for _, piece in pieces]
    assert arguments == [[{"index": 0, "function": {"arguments": letter}}] for letter in '{"q": "tea"}']
    assert [at for at, _ in pieces] == list(range(begun + 1, len(CALL)))
    assert [piece["logprobs"]["content"][0]["token"] for _, piece in pieces] == list('{"q": "tea"}')
    assert (last["delta"]["tool_calls"][0]["function"], last["logprobs"]["content"][0]["token"]) == (
        {"arguments": ""},
        "}",
    )
    assert (finish["delta"], finish["finish_reason"]) == ({}, "tool_calls")


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


HUMAN = HumanResponseRenderer(cast(TextTokenizer, FakeTokenizer()))


def told(says: str, size: int, layout: CallLayout | None = HUMAN.call_layout) -> list[Piece]:
    """The pieces of an answer that comes `size` characters at a time."""
    reader = CallReader(layout, HUMAN.parse_text)
    pieces = [piece for i in range(0, len(says), size) for piece in reader.feed(says[i : i + size])]
    return pieces + reader.finish()


def content_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if piece.call is None)


def arguments_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    heads = [piece for piece in pieces if piece.name is not None]
    assert [head.call for head in heads] == list(range(len(heads)))
    return [(str(h.name), "".join(p.text for p in pieces if p.call == h.call)) for h in heads]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("says", SAYINGS.values(), ids=SAYINGS)
def test_an_answer_is_read_as_the_renderer_reads_it_however_it_is_cut(says: str, size: int) -> None:
    pieces, message = told(says, size), HUMAN.parse_text(says)
    assert content_of(pieces) == message.content
    assert arguments_of(pieces) == [(call.name, call.arguments) for call in message.tool_calls]
    ends = [piece.end for piece in pieces]
    assert ends == sorted(ends)
    assert not ends or ends[-1] <= len(says)


TRICKY = [
    '{"q": "a } in a string {"}',
    '{"q": "\\""}',
    '{"q": "\\\\"}',
    '{"q": "\\\\\\"}{"}',
    '{"q": {"r": [{}, {"s": "}"}]}, "t": "ü\\u00fc"}',
    "{}",
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("arguments", TRICKY)
@pytest.mark.parametrize("layout", [HUMAN.call_layout, HERMES], ids=["human_response", "hermes"])
def test_arguments_come_letter_for_letter_and_end_where_they_end(layout: CallLayout, arguments: str, size: int) -> None:
    calls = [f'{{"name": "{name}", "arguments": {arguments}}}' for name in ("look", "put")]
    says = "Well.\n\n" + layout.before + layout.between.join(calls) + layout.after
    pieces = told(says, size, layout)
    assert arguments_of(pieces) == [("look", arguments), ("put", arguments)]
    assert content_of(pieces) == "Well."


def test_arguments_come_as_they_are_made() -> None:
    pieces = [piece.text for piece in told(CALL, 1) if piece.call is not None]
    assert pieces == ["", *'{"q": "tea"}']


@pytest.mark.parametrize("layout", [HUMAN.call_layout, HERMES], ids=["human_response", "hermes"])
@pytest.mark.parametrize("size", [1, 1000])
def test_a_cut_answer_is_a_call_from_its_arguments_on_and_no_letter_is_told_twice(
    layout: CallLayout, size: int
) -> None:
    head = layout.before + '{"name": "look", "arguments": '
    block = head + '{"q": "tea"}}' + layout.between + '{"name": "put", "arguments": {"a": 1}}' + layout.after
    for end in range(len(block) + 1):
        pieces = told(block[:end], size, layout)
        calls = arguments_of(pieces)
        if end < len(head):
            assert (content_of(pieces), calls) == (block[:end], [])
        else:
            assert content_of(pieces) == ""
            assert calls[0] == ("look", block[len(head) : end][: len('{"q": "tea"}')])
            assert len(calls) == 1 or calls[1][0] == "put"


@pytest.mark.parametrize("layout", [HUMAN.call_layout, HERMES], ids=["human_response", "hermes"])
@pytest.mark.parametrize("fill", [" ", "\n", "#", " \n#"])
def test_what_may_stand_before_a_call_is_looked_at_once_however_long_it_is(layout: CallLayout, fill: str) -> None:
    """A regular expression looked through it from every place in it: 12 s for 20,000 characters."""
    says = "x" + fill * 100_000 + "y"
    assert content_of(told(says, 1_000, layout)) == says
    call = layout.before + '{"name": "look", "arguments": {}}' + layout.after
    pieces = told(says + "\n\n" + call, 1_000, layout)
    assert (content_of(pieces), arguments_of(pieces)) == (says, [("look", "{}")])


def test_text_that_cannot_be_a_call_is_not_held_back() -> None:
    reader = CallReader(HUMAN.call_layout, lambda text: Message("assistant", text))
    assert content_of(reader.feed("Hello")) == "Hello"
    assert content_of(reader.feed(" there\n")) == " there"
    assert content_of(reader.feed("you")) == "\nyou"


def test_a_format_without_calls_holds_nothing_back() -> None:
    reader = CallReader(None, lambda text: Message("assistant", text, tool_calls=(ToolCall("c", "f", "{}"),)))
    assert content_of(reader.feed("### CALL:")) == "### CALL:"
    assert reader.finish() == []
