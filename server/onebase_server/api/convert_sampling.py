"""Wire sampling parameters -> the engine's. Shared by every endpoint that generates."""

from dataclasses import dataclass
from typing import TypeVar

from onebase.errors import ContextLengthExceeded, InvalidInput
from onebase_server.api.schemas_common import SamplingBody
from onebase_server.engine.types import GrammarTrigger, SamplingParams

T = TypeVar("T")
LONG_TEXT = 8_000
"""Characters that become tokens in a few milliseconds: more is not done on the event loop."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What an endpoint adds to the shared parameters."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    """The prompt format's own stop sequences."""
    stop_token_ids: frozenset[int] = frozenset()
    """The prompt format's own end tokens."""
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    trigger: GrammarTrigger | None = None


def to_sampling(body: SamplingBody, extras: Extras, vocab_size: int) -> SamplingParams:
    """Raises InvalidInput for what only the base can tell (a token id out of its vocabulary)."""
    return SamplingParams(
        max_tokens=extras.max_tokens,
        min_tokens=_min_tokens(body, extras.max_tokens),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, _or(body.top_k, 0)),  # vLLM's clients say -1 for "all"
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        seed=body.seed,
        top_logprobs=extras.top_logprobs,
        prompt_logprobs=extras.prompt_logprobs,
        stop=_stop(body) + extras.stop,
        stop_token_ids=_stop_token_ids(body, vocab_size) | (frozenset() if body.ignore_eos else extras.stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        grammar=extras.grammar,
        trigger=extras.trigger,
    )


def answer_limit(asked: int | None, prompt_tokens: int, max_context: int, *, param: str) -> int:
    """Tokens that the answer may have: what was asked, or up to the context's end.

    Raises ContextLengthExceeded when the prompt leaves no room for a single token.
    """
    room = max_context - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(max_context, prompt_tokens, param=param)
    return room if asked is None else min(asked, room)


def check_stream_options(body: SamplingBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidInput(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            param="stream_options",
            code="invalid_value",
        )


def choices_of(body: SamplingBody, max_choices: int) -> int:
    n = _or(body.n, 1)
    if n > max_choices:
        raise InvalidInput(
            f"Invalid 'n': integer above max value. Expected a value <= {max_choices}.",
            param="n",
            code="integer_above_max_value",
        )
    return n


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _min_tokens(body: SamplingBody, max_tokens: int) -> int:
    asked = _or(body.min_tokens, 0)
    if asked > max_tokens:
        raise InvalidInput(
            f"Invalid 'min_tokens': {asked} is more than the {max_tokens} tokens that the answer may have.",
            param="min_tokens",
            code="integer_above_max_value",
        )
    return asked


def _stop(body: SamplingBody) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    if body.stop == "":
        raise InvalidInput("Invalid value for 'stop': it must not be empty.", param="stop", code="invalid_value")
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    ids: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isdecimal() or not key.isascii() or int(key) >= vocab_size:
            raise InvalidInput(
                f"Invalid key in 'logit_bias': {key[:20]}. Expected a token id below {vocab_size}.",
                param="logit_bias",
                code="invalid_value",
            )
        ids[int(key)] = value
    return ids


def _stop_token_ids(body: SamplingBody, vocab_size: int) -> frozenset[int]:
    ids = body.stop_token_ids or []
    for i, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise InvalidInput(
                f"Invalid 'stop_token_ids[{i}]': expected a token id below {vocab_size}.",
                param=f"stop_token_ids[{i}]",
                code="invalid_value",
            )
    return frozenset(ids)
