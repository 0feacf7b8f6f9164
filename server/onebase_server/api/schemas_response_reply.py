"""What `/v1/responses` answers on the wire: a response, its items, its stream's events, and lists of what was asked."""

from typing import Any, Literal

from onebase_server.api.schemas_chat import LogprobEntry
from onebase_server.api.schemas_common import ListPage, Wire
from onebase_server.api.schemas_responses import ResponseTool, ResponseToolChoice, TextSettings


class OutputText(Wire):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[LogprobEntry]


class OutputMessage(Wire):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(Wire):
    id: str
    type: Literal["function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(Wire):
    cached_tokens: int


class OutputTokensDetails(Wire):
    reasoning_tokens: int


class ResponseUsage(Wire):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Wire):
    reason: Literal["max_output_tokens"]


class ResponseFailure(Wire):
    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class ResponseBody(Wire):
    """OpenAI's Response: what was asked and what came."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, None]
    store: bool
    temperature: float
    text: TextSettings
    tool_choice: ResponseToolChoice
    tools: list[ResponseTool]
    top_p: float
    top_logprobs: int
    truncation: Literal["disabled"]
    background: Literal[False]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseDeleted(Wire):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class StoredInputItem(Wire):
    id: str
    type: str
    role: str | None = None
    content: list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None


class InputItemList(ListPage):
    data: list[StoredInputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseEvent(Wire):
    """One event of a stream. `type` is also its SSE event's name; the other fields depend on it."""

    type: str
    sequence_number: int
    response: ResponseBody | None = None
    item: OutputMessage | OutputCall | None = None
    part: OutputText | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    name: str | None = None
    logprobs: list[LogprobEntry] | None = None
    message: str | None = None
    code: str | None = None
    param: str | None = None
