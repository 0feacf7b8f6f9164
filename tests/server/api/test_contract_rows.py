"""Rows of OpenAI's contract that no other file here tells: each keyword of strict schemas, and determinism."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api_world import World, text_of

TWO = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}
VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "string": ({"type": "string"}, "5"),
    "number": ({"type": "number"}, '"x"'),
    "integer": ({"type": "integer"}, "1.5"),
    "boolean": ({"type": "boolean"}, "0"),
    "null": ({"type": "null"}, '"null"'),
    "enum": ({"type": "string", "enum": ["red", "blue"]}, '"green"'),
    "const": ({"const": "yes"}, '"no"'),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, '"x"'),
    "minItems": (TWO, "[]"),
    "maxItems": (TWO, '["a", "b", "c"]'),
    "items": (TWO, "[1, 2]"),
    "object": ({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False}, '{"b": 1}'),
    "$ref": ({"$ref": "#/$defs/colour"}, '"green"'),
}
"""Keyword -> the schema of a value, and a value against it that the model wants to say."""


@pytest.mark.parametrize(("schema", "wants"), VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_schema_is_kept_in_each_of_its_keywords(
    obedient_world: World, schema: dict[str, Any], wants: str, stream: bool
) -> None:
    whole = {
        "type": "object",
        "properties": {"v": schema},
        "required": ["v"],
        "additionalProperties": False,
        "$defs": {"colour": {"type": "string", "enum": ["red", "blue"]}},
    }
    validator = Draft202012Validator(whole)
    assert not validator.is_valid(json.loads(f'{{"v": {wants}}}'))
    for says in (f'{{"v": {wants}}}', "{}", f'{{"w": 1, "v": {wants}}}', "Hello."):
        obedient_world.says = says
        spec = {"type": "json_schema", "json_schema": {"name": "n", "schema": whole, "strict": True}}
        if stream:
            chunks = obedient_world.chunks(response_format=spec)
            text, finish = text_of(chunks), chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = obedient_world.chat(response_format=spec).json()["choices"][0]
            text, finish = choice["message"]["content"], choice["finish_reason"]
        assert finish == "stop"
        validator.validate(json.loads(text))


def texts(world: World, **fields: Any) -> list[str]:
    choices = world.chat(max_tokens=12, **fields).json()["choices"]
    return [choice["message"]["content"] for choice in choices]


def test_greedy_and_seeded_answers_repeat_and_seeds_differ(own_world: World) -> None:
    own_world.runner.reply = None  # answers that depend on prompt, temperature and seed
    assert texts(own_world, temperature=0) == texts(own_world, temperature=0, seed=5)
    assert texts(own_world, seed=1) == texts(own_world, seed=1)
    assert texts(own_world, seed=1) != texts(own_world, seed=2)
    assert texts(own_world, seed=-1) != texts(own_world, seed=1)


def test_seeded_choices_differ_among_themselves_and_repeat_as_a_list(own_world: World) -> None:
    own_world.runner.reply = None
    four = texts(own_world, seed=3, n=4)
    assert len(set(four)) == 4
    assert texts(own_world, seed=3, n=4) == four
    assert texts(own_world, seed=3, n=2) == four[:2], "a choice does not depend on how many there are"
    chunks = own_world.chunks(seed=3, n=4, max_tokens=12)
    assert [text_of(chunks, index) for index in range(4)] == four
