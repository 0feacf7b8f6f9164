"""What every wire schema stands on: strict types, and OpenAI's error body. Wire models never enter the engine."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag


class Wire(BaseModel):
    """A value that crosses the wire. Strict: `"0.5"` is no number. Replies leave out what was not set."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )


class RequestPart(Wire):
    """An object in a request. Unknown fields are kept, so that `decode` can refuse them by name."""

    model_config = ConfigDict(extra="allow")


class RequestBody(RequestPart):
    """The outermost object of a request."""


class ErrorDetail(Wire):
    message: str
    type: str
    param: str | None
    """Path of the field, as in `messages[0].content`."""
    code: str | None
    """A word for programs."""


class ErrorBody(Wire):
    """OpenAI's error object: the body of every reply that is not 200."""

    error: ErrorDetail


class ListPage(Wire):
    object: Literal["list"] = "list"


def kind_of(value: Any) -> str | None:
    """Which arm of a `TextOrList` union a value is for. Tags start with `#` so that error paths can drop them."""
    if isinstance(value, str):
        return "#text"
    return "#list" if isinstance(value, list | tuple) else None


text_or_list = Discriminator(
    kind_of, custom_error_type="text_or_list_type", custom_error_message="expected a string or an array"
)
Text = Annotated[str, Tag("#text")]

Stop = Annotated[
    Text | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=4), Tag("#list")],
    text_or_list,
]


def without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("it may not hold a NUL character")
    return text


no_nul = AfterValidator(without_nul)
"""For text that goes into the database: PostgreSQL has no NUL."""
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64), no_nul], Annotated[str, Field(max_length=512), no_nul]],
    Field(max_length=16),
]
LogitBias = dict[str, Annotated[float, Field(ge=-100, le=100)]]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(RequestPart):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted, ignored: there is no padding to leave out."""


class SamplingBody(RequestBody):
    """What chat and text completions ask for alike: OpenAI's parameters, then vLLM's common extras."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=128)] | None = None


class PromptTokensDetails(Wire):
    cached_tokens: int = 0


class CompletionTokensDetails(Wire):
    reasoning_tokens: int = 0


class UsageBody(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
