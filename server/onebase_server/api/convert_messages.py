"""Wire messages and tools -> core's. The rules between a message's fields stand here, each naming its field."""

from collections.abc import Sequence

from onebase.errors import InvalidInput
from onebase.messages import Message, Tool, ToolCall
from onebase_server.api.schemas_chat import ChatMessage, ContentPart, ToolSpec


def to_messages(wire: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Raises InvalidInput whose `param` is the path of the first wrong field."""
    return tuple(_to_message(message, f"messages[{i}]") for i, message in enumerate(wire))


def _to_message(message: ChatMessage, path: str) -> Message:
    content = _to_text(message, f"{path}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise missing(f"{path}.tool_call_id")
    if message.role == "function" and message.name is None:
        raise missing(f"{path}.name")
    if message.tool_calls and message.role != "assistant":
        raise InvalidInput(
            f"Invalid value for '{path}.tool_calls': only an assistant message may hold calls.",
            param=f"{path}.tool_calls",
            code="invalid_value",
        )
    calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ())
    return Message(message.role, content, message.name, calls, message.tool_call_id)


def _to_text(message: ChatMessage, path: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant" and (message.tool_calls or message.refusal is not None):
            return message.refusal or ""
        raise missing(path)
    parts = [_part_text(part, message.role, f"{path}[{i}]") for i, part in enumerate(message.content)]
    return "".join(parts)


def _part_text(part: ContentPart, role: str, path: str) -> str:
    if part.type == "refusal" and role == "assistant":
        if part.refusal is None:
            raise missing(f"{path}.refusal")
        return part.refusal
    if part.type != "text":
        raise InvalidInput(
            f"Invalid value for '{path}.type': '{part.type}'. This model reads text only: expected 'text'.",
            param=f"{path}.type",
            code="invalid_value",
        )
    if part.text is None:
        raise missing(f"{path}.text")
    return part.text


def to_tools(wire: Sequence[ToolSpec]) -> tuple[Tool, ...]:
    names = [tool.function.name for tool in wire]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidInput(
                f"Invalid 'tools[{i}].function.name': there are two tools called '{name}'.",
                param=f"tools[{i}].function.name",
                code="invalid_value",
            )
    return tuple(
        Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {}) for tool in wire
    )


def missing(param: str) -> InvalidInput:
    return InvalidInput(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
