"""`/v1/completions` on the wire: the bare prompt, no chat template."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from onebase_server.api.schemas_common import SamplingBody, UsageBody, Wire

TokenId = Annotated[int, Field(ge=0)]


def prompt_kind(value: Any) -> str | None:
    """Which of the four forms of `prompt` this is, told by its first item."""
    if isinstance(value, str):
        return "#text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, list):
        return "#token_lists"
    return "#tokens" if isinstance(first, int) and not isinstance(first, bool) else "#texts"


Prompt = Annotated[
    Annotated[str, Tag("#text")]
    | Annotated[list[str], Field(min_length=1, max_length=128), Tag("#texts")]
    | Annotated[list[TokenId], Field(min_length=1), Tag("#tokens")]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(max_length=128), Tag("#token_lists")],
    Discriminator(
        prompt_kind,
        custom_error_type="text_or_list_type",
        custom_error_message="expected a string, an array of strings or an array of token ids",
    ),
]


class CompletionRequest(SamplingBody):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class CompletionLogprobs(Wire):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Wire):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None


class Completion(Wire):
    """The reply, and each event of a stream (where `finish_reason` is null until the end)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None
    system_fingerprint: str
