"""Constrained decoding by llguidance: grammars from JSON Schemas and for tool calls, and the engine's backend.

Masks come from the base's own token bytes, the very ones that the detokenizer turns into text, so what a grammar
allows and what a client reads can't differ. A grammar travels as llguidance's serialised text.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance import TokenizerWrapper as Wrapper
from numpy.typing import NDArray

from onebase.errors import EngineError, InvalidInput
from onebase.prompt_types import CallLayout
from onebase_server.engine.grammar import GrammarMatcher
from onebase_server.engine.grammar_trigger import AtOnceMatcher, TriggeredMatcher, TriggerTable
from onebase_server.engine.types import GrammarTrigger

JSON_OPTIONS: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python's json.dumps writes it. Free white space is legal JSON too, but a small model may never leave it."""

Schema = Mapping[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
COMPOUND = frozenset(("$ref", "allOf", "anyOf", "oneOf"))


class Vocabulary(Protocol):
    """What is asked of a tokenizer (core's TextTokenizer has it)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int, /) -> bytes: ...


def json_grammar(schema: Schema, *, param: str) -> str:
    """The grammar of the JSON texts that match `schema`. Raises InvalidInput naming `param` for a schema that
    llguidance can't enforce exactly."""
    grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=dict(JSON_OPTIONS))  # type: ignore[arg-type]
    return checked(grammar, param=param)


def call_grammar(
    calls: Mapping[str, Schema], layout: CallLayout, *, many: bool, param: str, answer: Schema | None = None
) -> str:
    """The grammar of one tool call (or `many`): `calls` maps each name that may be called to its arguments' schema.

    `layout` is the prompt format's: what opens a block of calls, what stands between two, and what closes the block.
    With `answer`, JSON of that schema may be said instead of calling.
    """
    before, between, after = map(_literal, (layout.before, layout.between, layout.after))
    block = f"{before} call {f'({between} call)*' if many else ''} {after}".rstrip()
    rules = [f"start: {block}" if answer is None else f"start: answer | {block}"]
    if answer is not None:
        rules.append(f"answer: {_json_rule(answer)}")
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(calls))))
    for i, (name, schema) in enumerate(calls.items()):
        rules.append(f"call{i}: {_literal(call_head(name))} arguments{i} {_literal('}')}")
        rules.append(f"arguments{i}: {_json_rule(of_object(schema, param))}")
    return checked(LLMatcher.grammar_from_lark("\n".join(rules)), param=param)


CALL_HEAD = '{"name": "'


def call_head(name: str) -> str:
    return f'{CALL_HEAD}{name}", "arguments": '


def of_object(schema: Schema, param: str) -> Schema:
    """Arguments are an object, whether the schema says so or not."""
    if schema.get("type", "object") != "object":
        raise InvalidInput(
            f"Invalid schema for '{param}': arguments must be of type 'object'.", param=param, code="invalid_value"
        )
    return schema if COMPOUND & schema.keys() else {**ANY_OBJECT, **schema}


def checked(grammar: str, *, param: str) -> str:
    """The grammar itself; InvalidInput if llguidance can't enforce it."""
    problem = _problem(grammar)
    if problem:
        raise InvalidInput(f"Invalid schema for '{param}': {problem}", param=param, code="invalid_value")
    return grammar


@lru_cache(maxsize=64)
def _problem(grammar: str) -> str:
    """Agents send the same tools with every request: the answer is kept."""
    problem = LLMatcher.validate_grammar(grammar)
    if not problem or problem.startswith("WARNING"):
        return ""
    return str(problem).removeprefix("ERROR: ").splitlines()[0][:300]


def _json_rule(schema: Schema) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': dict(JSON_OPTIONS)})}"


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


class LlguidanceBackend:
    """The engine's `GrammarBackend`. The vocabulary's trie is built once, at the first grammar."""

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._vocabulary = tokenizer
        self._tokenizer = build_tokenizer(tokenizer)
        self._tables: dict[GrammarTrigger, TriggerTable] = {}
        self._compiled = lru_cache(maxsize=32)(self._compile)

    def compile(self, grammar: str, trigger: GrammarTrigger | None = None) -> GrammarMatcher:
        matcher = self._compiled(grammar).fork()
        if trigger is None:
            return matcher
        if trigger.at_once:
            return AtOnceMatcher(matcher, trigger.opening.encode(), self._vocabulary.token_bytes)
        table = self._tables.get(trigger)
        if table is None:
            table = self._tables[trigger] = TriggerTable(trigger, self._vocabulary)
        return TriggeredMatcher(matcher, table, self._vocabulary.token_bytes, self._vocabulary.encode)

    def _compile(self, grammar: str) -> "LlguidanceMatcher":
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidInput(f"the grammar can't be used: {matcher.get_error()[:300]}", param="response_format")
        return LlguidanceMatcher(matcher)


class LlguidanceMatcher:
    """Where one sequence stands in its grammar."""

    heeds_stops = True
    rules = True

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fork(self) -> "LlguidanceMatcher":
        return LlguidanceMatcher(self._matcher.deep_copy())

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        assert mask.flags["C_CONTIGUOUS"]
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise EngineError(f"the grammar failed: {self._matcher.get_error()}")

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise EngineError(f"token {token_id} is not in the grammar: {self._matcher.get_error()}")


class _Bytes:
    """Our tokenizer in the shape that llguidance reads."""

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        # No text: they may only ever come as an end, which llguidance knows by the eos ids.
        self.special_token_ids = [i for i, raw in enumerate(self.tokens) if not raw]
        for i in self.special_token_ids:
            self.tokens[i] = f"<onebase:{i}>".encode()

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def build_tokenizer(tokenizer: Vocabulary) -> LLTokenizer:
    """Takes a tenth of a second for 50,000 tokens."""
    ends = sorted(tokenizer.eos_ids)
    return LLTokenizer(Wrapper(_Bytes(tokenizer)), n_vocab=tokenizer.vocab_size, eos_token=ends)
