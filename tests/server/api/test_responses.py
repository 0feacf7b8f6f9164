"""`/v1/responses`: the object, its events in order, going on from an earlier one, and errors in its own words."""

import json
from itertools import groupby
from typing import Any

import pytest

from api_world import BASE, World, error_of, with_settings
from onebase.errors import NotFound
from onebase_server.api.response_plan import LOGPROBS
from onebase_server.api.response_store import KEEP_S, ResponseStore
from onebase_server.api.schemas_chat import ChatMessage
from onebase_server.api.schemas_response_reply import ResponseBody, ResponseEvent

TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object"}}
CALL = '### CALL:\n{"name": "look", "arguments": {"q": "tea"}}'


def respond(world: World, **fields: Any) -> dict[str, Any]:
    reply = world.post("/v1/responses", {"model": BASE, "input": "Hi", **fields})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    ResponseBody.model_validate_json(reply.content)
    return body


def events(world: World, **fields: Any) -> list[dict[str, Any]]:
    reply = world.post("/v1/responses", {"model": BASE, "input": "Hi", "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    *blocks, last = reply.text.split("\n\n")
    assert last == ""
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        ResponseEvent.model_validate_json(data.removeprefix("data: "))
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_the_object_has_what_clients_read(world: World) -> None:
    body = respond(world)
    assert body["object"] == "response"
    assert body["id"].startswith("resp_")
    assert (body["status"], body["error"], body["incomplete_details"]) == ("completed", None, None)
    [item] = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "Hello there.", "annotations": [], "logprobs": []}]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == ([], "auto", True)
    assert (body["temperature"], body["top_p"], body["store"]) == (1.0, 1.0, True)


def prompt_of(world: World, **fields: Any) -> str:
    world.runner.batches.clear()
    world.runner.keep_batches = True
    respond(world, **fields)
    world.runner.keep_batches = False
    return bytes(token for token in world.runner.batches[-1].rows[0].prompt_ids if token < 256).decode()


HI = "### HUMAN:\nHi\n\n### RESPONSE:\n"
HO = {
    "type": "message",
    "role": "assistant",
    "id": "msg_1",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Ho", "annotations": []}],
}
USER = {"role": "user", "content": "Hi"}
INPUTS: list[tuple[Any, str]] = [
    ("Hi", HI),
    ([USER], HI),
    ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], HI),
    ([{"role": "developer", "content": "Be brief."}, USER], "### SYSTEM:\nBe brief.\n\n" + HI),
    (
        [USER, HO, {"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "On"}],
        HI + "Ho\n\n### HUMAN:\nOn\n\n### RESPONSE:\n",
    ),
]


@pytest.mark.parametrize(("given", "prompt"), INPUTS, ids=range(len(INPUTS)))
def test_every_form_of_input_reaches_the_prompt(world: World, given: Any, prompt: str) -> None:
    assert prompt_of(world, input=given) == prompt


def test_instructions_are_a_system_message(world: World) -> None:
    assert prompt_of(world, instructions="Be brief.").startswith("### SYSTEM:\nBe brief.\n\n### HUMAN:\nHi")


def test_the_limit_makes_it_incomplete(world: World) -> None:
    body = respond(world, max_output_tokens=5)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["content"][0]["text"] == "Hello"
    assert body["usage"]["output_tokens"] == 5


def test_an_adapter_answers_for_itself(world: World) -> None:
    body = respond(world, model="pirate")
    assert body["model"] == "pirate"
    assert body["output"][0]["content"][0]["text"].startswith("pirate@2 says")


def test_events_come_in_openais_order(world: World) -> None:
    found = events(world)
    kinds = [event["type"] for event in found]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event["delta"] for event in found if event["type"].endswith("delta")) == "Hello there."
    assert found[0]["response"]["status"] == "in_progress"
    final = found[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == "Hello there."
    assert final["id"] == found[0]["response"]["id"]
    assert final["usage"]["output_tokens"] == 13


def test_a_stream_cut_by_the_limit_ends_incomplete(world: World) -> None:
    last = events(world, max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_call_is_an_item_of_its_own(world: World) -> None:
    world.says = CALL
    body = respond(world, tools=[TOOL])
    [item] = body["output"]
    assert (item["type"], item["name"], json.loads(item["arguments"])) == ("function_call", "look", {"q": "tea"})
    assert item["call_id"].startswith("call_")
    assert item["id"].startswith("fc_")


def test_the_format_is_told_back_as_it_was_asked_for(obedient_world: World) -> None:
    obedient_world.says = '{"a": 1}'
    shape = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = {"type": "json_schema", "name": "n", "schema": shape, "strict": True}
    body = respond(obedient_world, text={"format": asked})
    assert body["text"]["format"] == asked
    assert obedient_world.get(f"/v1/responses/{body['id']}").json()["text"]["format"] == asked
    assert events(obedient_world, text={"format": asked})[-1]["response"]["text"]["format"] == asked


def test_a_call_is_streamed_in_its_events(world: World) -> None:
    world.says = "Let me see.\n\n" + CALL
    found = events(world, tools=[TOOL])
    kinds = [event["type"] for event in found if "function_call" in event["type"] or "output_item" in event["type"]]
    assert [kind for kind, _ in groupby(kinds)] == [
        "response.output_item.added",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    message, call = found[-1]["response"]["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert (call["name"], call["arguments"]) == ("look", '{"q": "tea"}')
    pieces = [event["delta"] for event in found if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call["arguments"]


@pytest.mark.parametrize("limit", [16, 40, 56, 62, 65])
def test_a_cut_call_is_the_same_whole_and_streamed(world: World, limit: int) -> None:
    world.says = "Let me see.\n\n" + CALL
    fields: dict[str, Any] = {"tools": [TOOL], "max_output_tokens": limit, "include": [LOGPROBS], "top_logprobs": 0}
    whole, final = respond(world, **fields), events(world, **fields)[-1]["response"]
    for item in (*whole["output"], *final["output"]):
        item.pop("id")
        item.pop("call_id", None)
    assert final["output"] == whole["output"]
    assert (final["status"], whole["status"]) == ("incomplete", "incomplete")
    if limit == 62:
        message, call = whole["output"]
        assert (message["status"], call["status"], call["arguments"]) == ("completed", "incomplete", '{"q": "te')


def test_a_call_and_its_output_go_back_into_the_prompt(world: World) -> None:
    items = [
        {"role": "user", "content": "Tea?"},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"q": "tea"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "4 pounds"},
    ]
    prompt = prompt_of(world, input=items, tools=[TOOL])
    assert CALL in prompt
    assert "### TOOL:\n4 pounds" in prompt


def test_it_goes_on_from_an_earlier_response(world: World) -> None:
    first = respond(world, instructions="Be brief.")
    second = respond(world, input="And?", previous_response_id=first["id"])
    prompt = prompt_of(world, input="More?", previous_response_id=second["id"])
    said = "### HUMAN:\nHi\n\n### RESPONSE:\nHello there.\n\n### HUMAN:\nAnd?\n\n### RESPONSE:\nHello there.\n\n"
    assert prompt == said + "### HUMAN:\nMore?\n\n### RESPONSE:\n", "and earlier instructions are gone"


def test_it_goes_on_from_a_streamed_response_with_a_call(world: World) -> None:
    world.says = CALL
    final = events(world, tools=[TOOL])[-1]["response"]
    output = {"type": "function_call_output", "call_id": final["output"][0]["call_id"], "output": "4 pounds"}
    prompt = prompt_of(world, input=[output], previous_response_id=final["id"], tools=[TOOL])
    assert CALL in prompt
    assert "### TOOL:\n4 pounds" in prompt


def test_a_response_can_be_read_and_forgotten(world: World) -> None:
    body = respond(world, input=[{"role": "user", "content": "A"}, {"role": "user", "content": "B"}])
    assert world.get(f"/v1/responses/{body['id']}").json() == body
    items = world.get(f"/v1/responses/{body['id']}/input_items").json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["B", "A"]
    assert world.request("DELETE", f"/v1/responses/{body['id']}").json()["deleted"] is True
    assert world.get(f"/v1/responses/{body['id']}").status_code == 404


def test_input_items_are_paged(world: World) -> None:
    body = respond(world, input=[{"role": "user", "content": text} for text in "ABCDE"])
    path = f"/v1/responses/{body['id']}/input_items"

    def page(**query: Any) -> tuple[str, bool, Any]:
        reply = world.get(path, params=query).json()
        ids = [item["id"] for item in reply["data"]]
        assert (reply["first_id"], reply["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
        return "".join(item["content"][0]["text"] for item in reply["data"]), reply["has_more"], reply["last_id"]

    assert page()[:2] == ("EDCBA", False)
    first = page(order="asc", limit=2)
    second = page(order="asc", limit=2, after=first[2])
    third = page(order="asc", limit=2, after=second[2])
    assert (first[:2], second[:2], third[:2]) == (("AB", True), ("CD", True), ("E", False))
    assert page(order="asc", after=third[2])[:2] == ("", False)
    assert page(limit=2, after=third[2])[:2] == ("DC", True)
    for query in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_none"}):
        refused = world.get(path, params=query)
        assert refused.status_code == 400
        assert error_of(refused)["param"] in query


def test_a_kept_response_is_not_streamed_again(world: World) -> None:
    body = respond(world)
    refused = world.get(f"/v1/responses/{body['id']}?stream=true")
    assert (refused.status_code, error_of(refused)["param"]) == (400, "stream")


def test_an_error_after_the_first_byte_is_an_event_of_this_api(own_world: World) -> None:
    own_world.runner.fail_next = RuntimeError("the device fell over")
    found = events(own_world)
    assert [event["type"] for event in found] == [
        "response.created",
        "response.in_progress",
        "error",
        "response.failed",
    ]
    error, failed = found[-2:]
    assert "fell over" not in json.dumps(found)
    assert error["message"].startswith("The server had an error")
    assert (error["code"], error["param"]) == ("server_error", None)
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": error["message"]}
    path = f"/v1/responses/{failed['response']['id']}"
    assert own_world.get(path).status_code == 404


def test_a_response_that_is_not_to_be_stored_is_not(world: World) -> None:
    body = respond(world, store=False)
    assert body["store"] is False
    assert world.get(f"/v1/responses/{body['id']}").status_code == 404


def test_another_keys_response_is_not_there(world: World) -> None:
    keyed = with_settings(world, api_keys=("sk-first-key", "sk-second-key"), admin_key="sk-admin-key")
    keyed.headers = {"Authorization": "Bearer sk-first-key"}
    body = respond(keyed)
    path = f"/v1/responses/{body['id']}"
    assert keyed.get(path).status_code == 200
    assert keyed.get(path, headers={"Authorization": "Bearer sk-second-key"}).status_code == 404
    assert keyed.get(path, headers={"Authorization": "Bearer sk-admin-key"}).status_code == 200


def test_a_kept_response_expires() -> None:
    now = [0.0]
    store = ResponseStore(lambda: now[0])
    response = ResponseBody.model_construct(id="resp_1")
    store.keep("ann", response, [], [])
    assert store.get("resp_1", "ann").response is response
    now[0] = KEEP_S + 1
    with pytest.raises(NotFound):
        store.get("resp_1", "ann")
    assert store.num_bytes == 0


def long_response(number: int) -> ResponseBody:
    return ResponseBody.model_construct(id=f"resp_{number}", model="x" * 10_000)


def test_the_least_recently_used_responses_are_forgotten_when_memory_is_short() -> None:
    store = ResponseStore(max_bytes=50_000)
    for number in range(4):
        store.keep("ann", long_response(number), [], [])
    store.get("resp_0", "ann")
    store.keep("ann", long_response(4), [], [])
    assert store.num_bytes <= 50_000
    for number in (0, 2, 3, 4):
        assert store.get(f"resp_{number}", "ann").response.id == f"resp_{number}"
    with pytest.raises(NotFound):
        store.get("resp_1", "ann")


def test_a_response_larger_than_the_memory_for_them_is_not_kept_and_costs_no_other() -> None:
    store = ResponseStore(max_bytes=50_000)
    store.keep("ann", long_response(1), [], [])
    store.keep("ann", long_response(2), [ChatMessage(role="user", content="x" * 50_000)], [])
    assert store.get("resp_1", "ann")
    with pytest.raises(NotFound):
        store.get("resp_2", "ann")


def test_a_message_counts_once_in_a_conversation_that_goes_on_and_until_the_last_of_it_is_gone() -> None:
    store = ResponseStore()
    said = [ChatMessage(role="user", content="x" * 100_000)]
    store.keep("ann", long_response(1), said, [])
    first = store.num_bytes
    store.keep("ann", long_response(2), [*said, ChatMessage(role="user", content="y")], [])
    assert store.num_bytes < first + 20_000
    store.delete("resp_1", "ann")
    assert store.num_bytes > 100_000
    store.delete("resp_2", "ann")
    assert store.num_bytes == 0


def test_the_memory_for_responses_is_a_setting(world: World) -> None:
    small = with_settings(world, response_memory_mb=1)
    ids = [respond(small, user="b" * 400_000)["id"] for _ in range(3)]
    assert [small.get(f"/v1/responses/{each}").status_code for each in ids] == [404, 200, 200]


def test_logprobs_come_when_they_are_included(world: World) -> None:
    body = respond(world, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = body["output"][0]["content"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == b"Hello there."
    assert len(entries[0]["top_logprobs"]) == 2
    found = events(world, include=["message.output_text.logprobs"])
    shown = [entry for event in found if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert len(shown) == 12


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"input": None}, "input", "invalid_type"),
    ({"input": []}, "input", "empty_array"),
    ({"input": [{"content": "x"}]}, "input[0].role", "missing_required_parameter"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "invalid_value"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type", "invalid_value"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "missing_required_parameter"),
    (
        {"input": [{"type": "function_call", "call_id": "x", "name": "y"}]},
        "input[0].arguments",
        "missing_required_parameter",
    ),
    ({"input": "x" * 600}, "input", "context_length_exceeded"),
    ({"temperature": 3}, "temperature", "decimal_above_max_value"),
    ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
    ({"top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice.name", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing_required_parameter"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_required_parameter"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}},
        "text.format.schema",
        "invalid_value",
    ),
    ({"previous_response_id": "resp_no"}, "previous_response_id", "previous_response_not_found"),
    ({"background": True}, "background", "invalid_value"),
    ({"background": 0}, "background", "invalid_type"),
    ({"truncation": "auto"}, "truncation", "invalid_value"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort", "invalid_value"),
    ({"input": [{"role": "user", "content": "Hi", "nmae": "x"}]}, "input[0].nmae", "unknown_parameter"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi", "x": 1}]}]},
        "input[0].content[0].x",
        "unknown_parameter",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "refusal"}]}]},
        "input[0].content[0].refusal",
        "missing_required_parameter",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "reasoning_text", "text": "x"}]}]},
        "input[0].content[0].type",
        "invalid_value",
    ),
    ({"text": {"format": {"type": "text"}, "tone": "dry"}}, "text.tone", "unknown_parameter"),
    ({"metadata": {"a": "b" * 513}}, "metadata.a", "string_above_max_length"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "invalid_type"),
    ({"include": ["message.output_text.logprob"]}, "include[0]", "invalid_value"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "unknown_parameter"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type", "invalid_value"),
    ({"input": [{"type": "function_call_output", "call_id": "c1", "output": "x"}]}, "input", None),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "invalid_value"),
    ({"conversation": "conv_1"}, "conversation", "unknown_parameter"),
]


@pytest.mark.parametrize(
    ("fields", "param", "code"), REFUSED, ids=[f"{param}-{i}" for i, (_, param, _) in enumerate(REFUSED)]
)
def test_a_wrong_field_is_named_in_this_apis_words(
    world: World, fields: dict[str, Any], param: str, code: str | None
) -> None:
    reply = world.post("/v1/responses", {"model": BASE, "input": "Hi", **fields})
    assert reply.status_code == 400, reply.text
    error = error_of(reply)
    assert (error["param"], error["code"]) == (param, code)
    assert "messages[" not in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"background": False, "truncation": "disabled", "include": [], "tools": [], "tool_choice": "auto"},
        {"reasoning": {}, "text": {"format": {"type": "text"}, "verbosity": "medium"}},
        {"reasoning": {"effort": "none", "summary": None}, "max_tool_calls": 3, "service_tier": "auto"},
        {"include": ["reasoning.encrypted_content"], "store": False},
        {"stream_options": {"include_obfuscation": False}, "parallel_tool_calls": True, "conversation": None},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_taken(world: World, fields: dict[str, Any]) -> None:
    respond(world, **fields)


def test_an_unknown_model_is_404(world: World) -> None:
    assert world.post("/v1/responses", {"model": "nobody", "input": "Hi"}).status_code == 404


def test_nulls_mean_the_default(world: World) -> None:
    names = ("instructions", "temperature", "top_p", "stream", "tools", "tool_choice", "text", "store", "reasoning")
    respond(world, **dict.fromkeys(names))
