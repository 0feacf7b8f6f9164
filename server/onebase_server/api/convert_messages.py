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
    for name in ("tool_calls", "function_call"):
        if getattr(message, name) and message.role != "assistant":
            raise wrong(f"{path}.{name}", "only an assistant message may hold calls")
    return Message(message.role, content, message.name, _calls(message, path), message.tool_call_id)


def _calls(message: ChatMessage, path: str) -> tuple[ToolCall, ...]:
    """`function_call`, as it was before `tool_calls`, is one call; it has no id, and training gives it none either."""
    old = message.function_call
    if old is not None and message.tool_calls:
        raise wrong(f"{path}.function_call", "'tool_calls' tell the calls already")
    if old is not None:
        return (ToolCall("", old.name, old.arguments),)
    return tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ())


def _to_text(message: ChatMessage, path: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        calls = message.tool_calls or message.function_call
        if message.role == "assistant" and (calls or message.refusal is not None):
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
            f"Invalid value for '{path}.type': only an assistant message may hold a refusal, expected 'text'.",
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


def wrong(param: str, why: str) -> InvalidInput:
    return InvalidInput(f"Invalid value for '{param}': {why}.", param=param, code="invalid_value")


def missing(param: str) -> InvalidInput:
    return InvalidInput(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
