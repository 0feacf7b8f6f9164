"""What `/v1/responses` takes on the wire, in its text form: strings, messages, function calls and their outputs."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticKnownError

from onebase_server.api.schemas_chat import FunctionName
from onebase_server.api.schemas_common import (
    Metadata,
    RequestBody,
    RequestPart,
    Seed,
    StreamOptions,
    Text,
    text_or_list,
)


class InputPart(RequestPart):
    """`input_text`, `output_text` and `refusal`: what a text model can read."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None
    # What is left in an answer that is sent back. Ignored: the text says it already.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None


InputContent = Annotated[Text | Annotated[list[InputPart], Tag("#list")], text_or_list]


class InputItem(RequestPart):
    """A message (the default), a `function_call`, or a `function_call_output`. `reasoning` items are left out."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: InputContent | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: InputContent | None = None
    # What is left in items that are sent back. Ignored.
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None
    parsed_arguments: Any = None


Input = Annotated[Text | Annotated[list[InputItem], Field(min_length=1, max_length=4096), Tag("#list")], text_or_list]


class ResponseTool(RequestPart):
    """A function, flat: unlike in chat there is no object of it inside."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(RequestPart):
    type: Literal["function"]
    name: str


def choice_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "#word"
    return "#named" if isinstance(value, dict | NamedResponseTool) else None


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#word")] | Annotated[NamedResponseTool, Tag("#named")],
    Discriminator(
        choice_kind, custom_error_type="tool_choice_type", custom_error_message="expected a string or an object"
    ),
]


class TextFormat(RequestPart):
    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(RequestPart):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None
    """The only one there is: a model says as much as it was trained to."""


def no_number(value: Any) -> Any:
    """To Python 0 is False, and so it would be to pydantic's literals."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticKnownError("bool_type")
    return value


class Reasoning(RequestPart):
    """Only what asks for none is taken."""

    effort: Literal["none"] | None = None
    summary: None = None


Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponseRequest(RequestBody):
    model: str
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    text: TextSettings | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Included] | None = None
    """`message.output_text.logprobs` asks for logprobs; the others name parts of items that no answer has here."""
    truncation: Literal["disabled"] | None = None
    background: Annotated[Literal[False], BeforeValidator(no_number)] | None = None
    reasoning: Reasoning | None = None
    metadata: Metadata | None = None
    # As vLLM has them.
    seed: Seed | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    # Accepted and ignored: they change nothing about the text.
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None
