"""Structured answers: whatever the model would say, the text matches the schema, or is the call that was demanded.

The fake model here obeys the engine's masks: it says what it wants where that is allowed, else what is.
"""

import json
from typing import Any

import pytest

from api_world import World, error_of, text_of

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"const": 1}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": PERSON}}
PUT = {"type": "function", "function": {"name": "put"}}


@pytest.fixture
def world(obedient_world: World) -> World:
    obedient_world.says = "Hello there."
    return obedient_world


def schema(schema: Any, **fields: Any) -> dict[str, Any]:
    spec = {"name": "thing", "schema": schema, "strict": True, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": spec}}


def said(world: World, **fields: Any) -> Any:
    reply = world.chat(**fields)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return json.loads(choice["message"]["content"])


def test_a_json_object_is_one_whatever_the_model_wants(world: World) -> None:
    assert isinstance(said(world, response_format={"type": "json_object"}), dict)


def test_a_schema_is_kept(world: World) -> None:
    person = said(world, **schema(PERSON))
    assert list(person) == ["name", "age"]
    assert person["name"] in ("Ann", "Bob")
    assert isinstance(person["age"], int)


def test_the_model_chooses_where_the_schema_leaves_a_choice(world: World) -> None:
    world.says = '{"name": "Bob", "age": 44}'
    assert said(world, **schema(PERSON)) == {"name": "Bob", "age": 44}


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_is_kept_strict_or_not(world: World, strict: Any) -> None:
    assert set(said(world, **schema(PERSON, strict=strict))) == {"name", "age"}


def test_references_and_recursion_work(world: World) -> None:
    assert said(world, **schema(TREE))["value"] == 1


def test_a_schema_may_be_left_out(world: World) -> None:
    spec = {"type": "json_schema", "json_schema": {"name": "thing"}}
    assert isinstance(said(world, response_format=spec), dict)


def test_text_is_free(world: World) -> None:
    reply = world.chat(response_format={"type": "text"}).json()
    assert reply["choices"][0]["message"]["content"] == "Hello there."


def test_a_stream_is_held_to_the_schema_too(world: World) -> None:
    assert set(json.loads(text_of(world.chunks(**schema(PERSON))))) == {"name", "age"}


def test_every_choice_is_held_to_it(world: World) -> None:
    for choice in world.chat(n=3, **schema(PERSON)).json()["choices"]:
        assert set(json.loads(choice["message"]["content"])) == {"name", "age"}


def test_an_answer_cut_by_the_limit_says_so(world: World) -> None:
    choice = world.chat(max_tokens=5, **schema(PERSON)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == '{"nam'


def test_a_header_inside_a_string_is_text(world: World) -> None:
    world.says = '{"a": "x ### HUMAN: y"}'
    one = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
    assert said(world, **schema(one)) == {"a": "x ### HUMAN: y"}


BAD = {
    "an unknown type": {"type": "banana"},
    "a type that is no word": {"type": 5},
    "a dangling reference": {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
    "a reference elsewhere": {"$ref": "http://example.org/schema"},
    "a keyword that can't be enforced": {"not": {"type": "string"}},
    "a pattern that is no regex": {"type": "string", "pattern": "("},
    "what nothing can match": {"type": "integer", "minimum": 5, "maximum": 4},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_schema_that_cannot_be_kept_is_refused(world: World, bad: Any) -> None:
    reply = world.chat(**schema(bad))
    assert reply.status_code == 400, reply.text
    error = error_of(reply)
    assert (error["param"], error["code"]) == ("response_format.json_schema.schema", "invalid_value")


def test_a_deep_schema_is_taken_or_refused_but_never_fatal(world: World) -> None:
    deep: Any = {"type": "string"}
    for _ in range(60):
        deep = {"type": "array", "items": deep, "minItems": 1, "maxItems": 1}
    assert world.chat(**schema(deep)).status_code in (200, 400)
    assert world.chat().status_code == 200


# Calls that are demanded


def calls(world: World, **fields: Any) -> list[dict[str, Any]]:
    reply = world.chat(tools=[LOOK, PUT], **fields)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    return [call["function"] for call in choice["message"]["tool_calls"]]


def test_a_required_call_is_made_whatever_the_model_wants(world: World) -> None:
    [call] = calls(world, tool_choice="required")
    assert call["name"] in ("look", "put")
    assert isinstance(json.loads(call["arguments"]), dict)


def test_a_named_call_is_made_with_arguments_of_its_schema(world: World) -> None:
    [call] = calls(world, tool_choice={"type": "function", "function": {"name": "look"}})
    assert call["name"] == "look"
    assert set(json.loads(call["arguments"])) == {"name", "age"}


def test_a_tool_without_parameters_takes_any_object(world: World) -> None:
    [call] = calls(world, tool_choice={"type": "function", "function": {"name": "put"}})
    assert isinstance(json.loads(call["arguments"]), dict)


TWO = '### CALL:\n{"name": "put", "arguments": {}}\n{"name": "look", "arguments": {"name": "Ann", "age": 3}}'


@pytest.mark.parametrize(("parallel", "count"), [(True, 2), (None, 2), (False, 1)])
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_parallel_calls_can_be_switched_off(world: World, choice: str, parallel: Any, count: int) -> None:
    world.says = TWO
    assert len(calls(world, tool_choice=choice, parallel_tool_calls=parallel)) == count


def test_a_demanded_call_is_streamed_as_one(world: World) -> None:
    chunks = world.chunks(tools=[LOOK], tool_choice="required")
    assert text_of(chunks) == ""
    deltas = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in chunks]
    arguments = "".join(each[0]["function"].get("arguments", "") for each in deltas if each)
    assert set(json.loads(arguments)) == {"name", "age"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_parameters_that_cannot_be_kept_are_refused_when_a_call_is_demanded(world: World) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": "banana"}}}
    reply = world.chat(tools=[bad], tool_choice="required")
    assert (reply.status_code, error_of(reply)["param"]) == (400, "tools")
    assert world.chat(tools=[bad]).status_code == 200, "unless none is demanded"


def test_neighbours_are_free(world: World) -> None:
    """A constrained and a free request in one batch."""
    import asyncio

    import httpx

    async def both() -> list[Any]:
        transport = httpx.ASGITransport(world.app, client=world.client)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            from api_world import chat_body

            bodies = [chat_body(), chat_body(**schema(PERSON)), chat_body(n=2)]
            return await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for body in bodies))

    free, bound, twice = (reply.json()["choices"] for reply in world.loop.run_until_complete(both()))
    assert free[0]["message"]["content"] == twice[1]["message"]["content"] == "Hello there."
    assert set(json.loads(bound[0]["message"]["content"])) == {"name", "age"}
