"""`/v1/chat/completions` on the wire. Rules between fields stand in `convert.py`, where they can name the field."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from onebase_server.api.schemas_common import Metadata, RequestPart, SamplingBody, Text, UsageBody, Wire, text_or_list

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class ContentPart(RequestPart):
    """A part of a message's content: `text`, and `refusal` of an assistant. A text model reads nothing else."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    Text | Annotated[list[ContentPart], Field(min_length=1), Tag("#list")],
    text_or_list,
]


class FunctionCall(RequestPart):
    name: FunctionName
    arguments: str
    """JSON, as a string."""
    parsed_arguments: Any = None
    """Some clients leave their copy in what they send back. Ignored."""


class ToolCallBody(RequestPart):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None
    """Clients that put a call together from a stream leave it in. Ignored."""


class ChatMessage(RequestPart):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallBody], Field(max_length=128)] | None = None
    function_call: FunctionCall | None = None
    """The older form of one call; a `function` message has its result."""
    tool_call_id: str | None = None
    refusal: str | None = None
    # What clients leave in a reply that they send back. Ignored: it is told by the content already.
    annotations: list[Any] | None = None
    parsed: Any = None


class FunctionSpec(RequestPart):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON Schema of the arguments' object."""
    strict: bool | None = None


class ToolSpec(RequestPart):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(RequestPart):
    name: str


class NamedTool(RequestPart):
    type: Literal["function"]
    function: NamedFunction


def choice_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "#word"
    return "#named" if isinstance(value, dict | NamedTool) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#word")] | Annotated[NamedTool, Tag("#named")],
    Discriminator(
        choice_kind, custom_error_type="tool_choice_type", custom_error_message="expected a string or an object"
    ),
]


class JsonSchemaSpec(RequestPart):
    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(RequestPart):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None


class ChatRequest(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    # The only values that there are here: a model says as much as it was trained to, and does not reason.
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    # Accepted and ignored: they change nothing about the text.
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    """A guess at the answer that could make it come faster."""


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int] | None


class LogprobEntry(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    content: list[LogprobEntry] | None
    refusal: None = None


class AssistantMessage(Wire):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCallBody] | None = None


FinishWord = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class ChatChoice(Wire):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    system_fingerprint: str
    service_tier: str | None = None


class FunctionDelta(Wire):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Wire):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Wire):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord | None


class ChatChunk(Wire):
    """One `data:` event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None
