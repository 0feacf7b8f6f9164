"""Constrained decoding on a real vocabulary: whatever is drawn from the masks, the text obeys the grammar."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onebase.errors import EngineError, InvalidInput
from onebase.tokenizer import TextTokenizer
from onebase_server.engine.grammar_llguidance import LlguidanceBackend, LlguidanceMatcher, call_grammar, json_grammar
from sample_tokenizers import smollm2_folder

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "tags": {"type": "array", "items": {"enum": ["a", 1]}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(smollm2_folder(tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="module")
def backend(tokenizer: TextTokenizer) -> LlguidanceBackend:
    return LlguidanceBackend(tokenizer)


def allowed(matcher: LlguidanceMatcher, tokenizer: TextTokenizer) -> list[int]:
    mask = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    matcher.fill_mask(mask)
    bits: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    return bits


def draw(matcher: LlguidanceMatcher, tokenizer: TextTokenizer, rng: random.Random) -> str:
    """A text by drawing any allowed token until the end is drawn."""
    ids: list[int] = []
    while True:
        choices = allowed(matcher, tokenizer)
        going_on = [i for i in choices if i not in tokenizer.eos_ids]
        if not going_on or (len(going_on) < len(choices) and rng.random() < 0.3):
            return tokenizer.decode(ids)
        # what ends an open value is taken soon, or texts would go on for ever
        ends = [i for i in going_on if tokenizer.token_bytes(i)[:1] in (b'"', b"]", b"}")]
        token = rng.choice(ends if ends and rng.random() < 0.5 else going_on)
        matcher.accept(token)
        ids.append(token)


@pytest.mark.parametrize("seed", range(8))
def test_any_draw_matches_the_schema(tokenizer: TextTokenizer, backend: LlguidanceBackend, seed: int) -> None:
    text = draw(backend.compile(json_grammar(PERSON, param="x")), tokenizer, random.Random(seed))
    value = json.loads(text)
    assert list(value) == ["name", "tags"]
    assert len(value["name"]) <= 12
    assert all(tag in ("a", 1) for tag in value["tags"])


@pytest.mark.parametrize("text", ['{"name": "Ann 😀", "tags": []}', '{"name": "é\\n", "tags": ["a", 1]}'])
def test_a_text_of_the_schema_is_allowed_token_for_token(
    tokenizer: TextTokenizer, backend: LlguidanceBackend, text: str
) -> None:
    matcher = backend.compile(json_grammar(PERSON, param="x"))
    for token in tokenizer.encode(text):
        assert token in allowed(matcher, tokenizer)
        matcher.accept(token)
    assert set(allowed(matcher, tokenizer)) & tokenizer.eos_ids


def test_no_control_token_is_allowed_inside(tokenizer: TextTokenizer, backend: LlguidanceBackend) -> None:
    matcher = backend.compile(json_grammar({"type": "string"}, param="x"))
    matcher.accept(tokenizer.encode('"')[0])
    assert not set(allowed(matcher, tokenizer)) & tokenizer.special_ids


def test_a_fork_goes_its_own_way(tokenizer: TextTokenizer, backend: LlguidanceBackend) -> None:
    first = backend.compile(json_grammar({"enum": ["ab", "cd"]}, param="x"))
    first.accept(tokenizer.encode('"')[0])
    second = first.fork()
    first.accept(tokenizer.encode("ab")[0])
    assert tokenizer.encode("cd")[0] in allowed(second, tokenizer)
    assert tokenizer.encode("cd")[0] not in allowed(first, tokenizer)


def test_a_token_outside_the_grammar_is_our_error(tokenizer: TextTokenizer, backend: LlguidanceBackend) -> None:
    with pytest.raises(EngineError):
        backend.compile(json_grammar({"type": "integer"}, param="x")).accept(tokenizer.encode("hello")[0])


def test_a_call_is_written_in_the_formats_layout(tokenizer: TextTokenizer, backend: LlguidanceBackend) -> None:
    layout = ("<<\n", "\n--\n", "\n>>")
    one = call_grammar({"f": {"type": "object", "properties": {}}}, layout, many=False, param="tools")
    text = draw(backend.compile(one), tokenizer, random.Random(1))
    assert text.startswith('<<\n{"name": "f", "arguments": {')
    assert text.endswith("}}\n>>")
    many = backend.compile(call_grammar({"f": {}, "g": {}}, layout, many=True, param="tools"))
    both = '<<\n{"name": "g", "arguments": {}}\n--\n{"name": "f", "arguments": {"a": 1}}\n>>'
    for token in tokenizer.encode(both):
        many.accept(token)


@pytest.mark.parametrize("schema", [{"type": "banana"}, {"not": {}}, {"$ref": "#/nowhere"}], ids=str)
def test_a_schema_that_cannot_be_kept_is_refused_by_name(schema: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        json_grammar(schema, param="response_format")
    assert caught.value.param == "response_format"


def test_it_loads_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import onebase_server.engine.grammar_llguidance, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
