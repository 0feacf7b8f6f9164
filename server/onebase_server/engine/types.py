"""The engine's vocabulary: what was asked, what comes out. Everyone imports these; they import only core.

No torch and no HTTP here. Tensors cross the `Runner` protocol (`engine/runner.py`) as numpy arrays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class FinishReason(StrEnum):
    """How a sequence ended. The API shows only STOP and LENGTH (and tool_calls, which it derives)."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable version: identity is `digest`, never the name (see docs/decisions)."""

    name: str
    version: int
    digest: str
    """sha256 over the version's weights and config: key of residency and of the prefix cache."""
    path: Path

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class GrammarTrigger:
    """What opens a call. Text is free until it holds `opening`; from there on, and with it, the grammar rules."""

    opening: str
    own_paragraph: bool
    """It counts only at the answer's start and behind an empty line."""
    goes_on: str
    """What the grammar has directly behind the opening, as far as it leaves no choice."""
    at_once: bool = False
    """The grammar rules from the first token, and a call is an answer that begins with the opening."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's own sampling. Defaults are OpenAI's; `top_k`, `min_p`, `repetition_penalty` are vLLM's."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """None: the engine draws one. Choice i of n uses a stream of its own derived from (seed, i)."""
    top_logprobs: int | None = None
    """None: no logprobs; 0..20: the chosen token's logprob and that many alternatives."""
    prompt_logprobs: int | None = None
    """As `top_logprobs`, for each token of the prompt but the first: given the tokens before it."""
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Eos ids of the base are added by the engine unless `ignore_eos`."""
    ignore_eos: bool = False
    grammar: str | None = None
    """Constrained decoding: a serialised grammar for the engine's grammar backend, or None."""
    trigger: GrammarTrigger | None = None
    """With a grammar: when it begins to rule. None: at once."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What was asked. `prompt_ids` are final: rendered, BOS included, checked against the context."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    n: int = 1
    priority: int = 0
    """Lower runs first; equal priorities are FIFO with fairness between owners, then between adapters."""
    deadline: float | None = None
    """time.monotonic() seconds."""
    owner: str | None = None
    """Whose it is: owners take turns, and one's prompts are no other's cached prefixes."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What comes out for one choice: new text, and on the last event the reason and the usage.

    Text never splits a UTF-8 character and never holds a stop string or part of one. Exactly one event of each
    choice has `finish_reason`; ERROR carries `error`. A choice's first event has the prompt's logprobs, if asked for.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
