"""`ResponseRequest` -> the chat that it is: items become messages, `text.format` becomes `response_format`.

Everything behind this is chat's own path; only names of fields in errors are put back into the caller's words.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from onebase.errors import InvalidInput
from onebase_server.api.convert_messages import missing
from onebase_server.api.decode import to_invalid_input
from onebase_server.api.schemas_chat import ChatMessage, ChatRequest, ContentPart, FunctionCall, ToolCallBody
from onebase_server.api.schemas_responses import (
    InputItem,
    InputPart,
    NamedResponseTool,
    ResponseRequest,
    TextFormat,
)

LOGPROBS = "message.output_text.logprobs"
SAME = ("model", "temperature", "top_p", "parallel_tool_calls", "seed", "top_k", "min_p", "repetition_penalty")
PARAMS = {
    "messages": "input",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "tool_choice.function.name": "tool_choice.name",
}
"""Chat's name of a field -> the Responses API's, longest first."""


def to_chat(body: ResponseRequest, history: Sequence[ChatMessage]) -> ChatRequest:
    """The chat request that answers `body`, after what was said before. Raises InvalidInput."""
    wants_logprobs = LOGPROBS in (body.include or [])
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME}
    said = to_chat_messages(body)
    check_outputs(history, said)
    fields["messages"] = [*instructions_of(body), *history, *said]
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["stream"] = body.stream
    fields["logprobs"] = wants_logprobs or None
    fields["top_logprobs"] = body.top_logprobs if wants_logprobs else None
    fields["response_format"] = response_format_of(body.text.format if body.text else None)
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
    # unlike a chat a response may leave the choice to the model where there is none
    fields["tool_choice"] = None if body.tool_choice == "auto" and not body.tools else body.tool_choice
    if isinstance(body.tool_choice, NamedResponseTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise to_invalid_input(error.errors(include_url=False)[0]) from error


def instructions_of(body: ResponseRequest) -> list[ChatMessage]:
    """Only this request's: those of earlier ones are not carried over."""
    return [ChatMessage(role="system", content=body.instructions)] if body.instructions else []


def check_outputs(history: Sequence[ChatMessage], said: Sequence[ChatMessage]) -> None:
    """An output belongs to a call that was made. Raises InvalidInput in OpenAI's words."""
    made: set[str | None] = {call.id for message in history for call in message.tool_calls or ()}
    for message in said:
        made |= {call.id for call in message.tool_calls or ()}
        if message.role == "tool" and message.tool_call_id not in made:
            raise InvalidInput(
                f"No tool call found for function call output with call_id {message.tool_call_id}.", param="input"
            )


def to_chat_messages(body: ResponseRequest) -> list[ChatMessage]:
    if isinstance(body.input, str):
        return [ChatMessage(role="user", content=body.input)]
    messages: list[ChatMessage] = []
    for i, item in enumerate(body.input):
        add_item(messages, item, f"input[{i}]")
    return messages


def add_item(messages: list[ChatMessage], item: InputItem, path: str) -> None:
    if item.type in (None, "message"):
        if item.role is None:
            raise missing(f"{path}.role")
        if item.content is None:
            raise missing(f"{path}.content")
        messages.append(ChatMessage(role=item.role, content=text_of(item.content, f"{path}.content")))
    elif item.type == "function_call":
        add_call(messages, item, path)
    elif item.type == "function_call_output":
        if item.call_id is None:
            raise missing(f"{path}.call_id")
        if item.output is None:
            raise missing(f"{path}.output")
        text = text_of(item.output, f"{path}.output")
        messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=text))


def add_call(messages: list[ChatMessage], item: InputItem, path: str) -> None:
    """Calls that follow each other, or an assistant's text, are one assistant message in a chat."""
    for name in ("call_id", "name", "arguments"):
        if getattr(item, name) is None:
            raise missing(f"{path}.{name}")
    function = FunctionCall.model_construct(name=item.name, arguments=item.arguments)
    call = ToolCallBody.model_construct(id=item.call_id, type="function", function=function)
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant":
        messages.append(ChatMessage(role="assistant", tool_calls=[call]))
    else:
        last.tool_calls = [*(last.tool_calls or []), call]


def text_of(content: str | list[InputPart], path: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def part_text(part: InputPart, path: str) -> str:
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type == "refusal":
        raise missing(f"{path}.refusal")
    if part.type == "reasoning_text":
        raise InvalidInput(
            f"Invalid value for '{path}.type': only a reasoning item may hold that. Expected 'input_text'.",
            param=f"{path}.type",
            code="invalid_value",
        )
    if part.text is None:
        raise missing(f"{path}.text")
    return part.text


def response_format_of(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type != "json_schema":
        return None if wanted is None else {"type": wanted.type}
    if wanted.name is None:
        raise missing("text.format.name")
    if wanted.schema_ is None:
        raise missing("text.format.schema")
    spec = {"name": wanted.name, "description": wanted.description, "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": spec}


def output_messages(text: str, calls: Sequence[ToolCallBody]) -> list[ChatMessage]:
    """The answer as the next request's history."""
    return [
        ChatMessage(role="assistant", content=[ContentPart(type="text", text=text)], tool_calls=list(calls) or None)
    ]


@contextmanager
def in_callers_words() -> Iterator[None]:
    """Errors of the chat path name chat's fields: here they get this API's names."""
    try:
        yield
    except InvalidInput as error:
        for chat, own in PARAMS.items():
            if error.param is not None and error.param.startswith(chat):
                error.message = error.message.replace(f"'{chat}", f"'{own}")
                error.param = own if chat == "messages" else own + error.param.removeprefix(chat)
                break
        raise
