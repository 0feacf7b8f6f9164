"""Constrained decoding on a real vocabulary: whatever is drawn from the masks, the text obeys the grammar."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onebase.errors import EngineError, InvalidInput
from onebase.prompt import HumanResponseRenderer
from onebase.prompt_types import CallLayout
from onebase.tokenizer import TextTokenizer
from onebase_server.engine.grammar import GrammarMatcher
from onebase_server.engine.grammar_llguidance import LlguidanceBackend, call_grammar, json_grammar
from onebase_server.engine.types import GrammarTrigger
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


def allowed(matcher: GrammarMatcher, tokenizer: TextTokenizer) -> list[int]:
    mask = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    matcher.fill_mask(mask)
    bits: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    return bits


def draw(matcher: GrammarMatcher, tokenizer: TextTokenizer, rng: random.Random) -> str:
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
    layout = CallLayout("<<\n", "\n--\n", "\n>>")
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


# Calls that may be made: free text first

LAYOUT = CallLayout("### CALL:\n", "\n", "", own_paragraph=True)
TRIGGER = GrammarTrigger("### CALL:", True, '\n{"name": "')
NUMBER = {"properties": {"q": {"type": "integer"}}, "additionalProperties": False}
TOOLS = {"f": NUMBER, "g": {**NUMBER, "required": ["q"]}}


@pytest.fixture
def triggered(backend: LlguidanceBackend) -> GrammarMatcher:
    return backend.compile(call_grammar(TOOLS, LAYOUT, many=True, param="tools"), TRIGGER)


def follow(matcher: GrammarMatcher, tokenizer: TextTokenizer, text: str) -> None:
    for token in tokenizer.encode(text):
        matcher.accept(token)


@pytest.mark.parametrize("text", ["", "Hello", "Hello\n\n###", "Hi\n### CALL:\nx", "#### CALL:\n", "a ### CALL: b"])
def test_text_that_opens_no_call_is_free(triggered: GrammarMatcher, tokenizer: TextTokenizer, text: str) -> None:
    follow(triggered, tokenizer, text)
    assert not triggered.rules


@pytest.mark.parametrize("lead", ["", "Let me see.\n\n"])
def test_the_token_that_completes_the_opening_may_only_go_on_as_the_grammar_does(
    triggered: GrammarMatcher, tokenizer: TextTokenizer, lead: str
) -> None:
    follow(triggered, tokenizer, lead + "### CALL")
    choices = allowed(triggered, tokenizer)
    beyond = {tokenizer.token_bytes(i)[1:] for i in choices if tokenizer.token_bytes(i).startswith(b":")}
    assert b"" in beyond
    assert all(b'\n{"name": "'.startswith(each) for each in beyond)
    every = {tokenizer.token_bytes(i)[1:] for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)[:1] == b":"}
    assert len(every) > len(beyond), "the vocabulary has tokens to forbid"
    assert {tokenizer.encode(" me")[0], *tokenizer.eos_ids} <= set(choices), "other text stays free"


@pytest.fixture(scope="module")
def pieces(tokenizer: TextTokenizer) -> dict[int, bytes]:
    """The tokens that an opening can be made of, and those that begin in it and go beyond."""
    said, ends = b"Well.\n\n### CALL:", tuple(b"Well.\n\n### CALL:"[i:] for i in range(16))
    every = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    return {i: raw for i, raw in every.items() if raw and (raw in said or raw.startswith(ends))}


@pytest.mark.parametrize("seed", range(6))
def test_any_draw_after_an_opening_in_any_cut_is_calls_of_the_offered_tools(
    triggered: GrammarMatcher, tokenizer: TextTokenizer, pieces: dict[int, bytes], seed: int
) -> None:
    rng = random.Random(seed)
    said = b"Well.\n\n### CALL:"[0 if seed % 2 else 7 :]
    ids: list[int] = []
    rest = said
    while rest:  # the opening in random pieces; the last may go beyond it
        free = not triggered.rules
        choices = pieces.keys() if free else pieces.keys() & set(allowed(triggered, tokenizer))
        fitting = [i for i in sorted(choices) if rest.startswith(pieces[i]) or pieces[i].startswith(rest)]
        ids.append(rng.choice(fitting))
        triggered.accept(ids[-1])
        rest = rest[len(pieces[ids[-1]]) :]
    text = tokenizer.decode(ids) + draw(triggered, tokenizer, rng)
    message = HumanResponseRenderer(tokenizer).parse_text(text)
    assert message.content == ("Well." if seed % 2 else "")
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.name in TOOLS
        assert isinstance(json.loads(call.arguments), dict)


def test_a_fork_of_free_text_opens_calls_of_its_own(triggered: GrammarMatcher, tokenizer: TextTokenizer) -> None:
    follow(triggered, tokenizer, "### CALL")
    twin = triggered.fork()
    follow(twin, tokenizer, ":\n{")
    follow(triggered, tokenizer, "S")
    assert twin.rules
    assert not twin.heeds_stops
    assert not triggered.rules
    assert triggered.heeds_stops


def test_an_answer_or_a_call_heeds_stops_only_as_an_answer(
    backend: LlguidanceBackend, tokenizer: TextTokenizer
) -> None:
    either = call_grammar(TOOLS, LAYOUT, many=True, param="tools", answer={"type": "object"})
    matcher = backend.compile(either, GrammarTrigger("### CALL:", True, '\n{"name": "', at_once=True))
    answer = matcher.fork()
    follow(answer, tokenizer, '{"a')
    assert answer.heeds_stops
    follow(matcher, tokenizer, "###")
    assert not matcher.heeds_stops
    follow(matcher, tokenizer, ' CALL:\n{"name": "f')
    assert not matcher.fork().heeds_stops


def test_a_tagged_call_opens_anywhere(backend: LlguidanceBackend, tokenizer: TextTokenizer) -> None:
    layout = CallLayout("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")
    trigger = GrammarTrigger("<tool_call>", False, '\n{"name": "')
    matcher = backend.compile(call_grammar({"f": {}}, layout, many=True, param="tools"), trigger)
    follow(matcher, tokenizer, "Let me see: <tool_call>")
    text = draw(matcher, tokenizer, random.Random(3))
    assert text.startswith('\n{"name": "f", "arguments": {')
    assert text.endswith("\n</tool_call>")


def test_it_loads_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import onebase_server.engine.grammar_llguidance, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
