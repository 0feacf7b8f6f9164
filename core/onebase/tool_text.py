"""Tool calls as plain text that a model can be trained on, and back.

The header that introduces them is the format's and handed in. Reading inverts writing for every content and every
argument text, valid JSON or not; docs/prompt.md shows the layout.
"""

import json
import re
from collections.abc import Sequence

from onebase.messages import Message, Tool, ToolCall


class CallBlock:
    """Content and calls as one text: the content, a blank line, `header` on a line, one JSON object a line.

    A line of the content that itself spells the header gets one more `#` in front, and loses it when read.
    `header` is like "### CALL:", without the line end.
    """

    def __init__(self, header: str) -> None:
        self._header = header
        hashes, word = header.split(" ", 1)
        self._spelt = re.compile(rf"^(#{{{len(hashes)},}} {re.escape(word)})", re.MULTILINE)
        self._stuffed = re.compile(rf"^#(#{{{len(hashes)},}} {re.escape(word)})", re.MULTILINE)
        self._block = re.compile(rf"(?:\A|\n\n){re.escape(header)}\n(.*)\Z", re.DOTALL)

    def write(self, message: Message) -> str:
        """The text that the assistant message is learnt as."""
        content = self._spelt.sub(r"#\1", message.content)
        if not message.tool_calls:
            return content
        lines = "\n".join(_write_call(call) for call in message.tool_calls)
        gap = "\n\n" if content else ""
        return f"{content}{gap}{self._header}\n{lines}"

    def read(self, text: str) -> Message:
        """The message of a generated text. Ids are `call_0`, `call_1`, ... A broken block stays content."""
        match = self._block.search(text)
        calls = _read_calls(match[1]) if match else ()
        content = text[: match.start()] if match and calls else text
        return Message("assistant", self._stuffed.sub(r"\1", content), tool_calls=calls)


def _write_call(call: ToolCall) -> str:
    """One line. Arguments stand as they are if they are a JSON object on one line, else as a JSON string."""
    name = json.dumps(call.name, ensure_ascii=False)
    one_line = "\n" not in call.arguments and "\r" not in call.arguments
    raw = call.arguments if one_line and isinstance(_loads(call.arguments), dict) else None
    arguments = raw if raw is not None else json.dumps(call.arguments, ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {arguments}}}'


def _read_calls(block: str) -> tuple[ToolCall, ...]:
    """The calls of a block; () if any of its lines is not one."""
    calls = []
    for number, line in enumerate(line for line in block.split("\n") if line.strip()):
        call = _loads(line)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            return ()
        calls.append(ToolCall(f"call_{number}", call["name"], _arguments_text(line, call)))
    return tuple(calls)


def _arguments_text(line: str, call: dict[str, object]) -> str:
    """The arguments letter for letter where the line has our own layout, else as JSON again."""
    arguments = call["arguments"]
    if isinstance(arguments, str):
        return arguments
    head = f'{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": '
    raw = line[len(head) : -1]
    if line.startswith(head) and isinstance(_loads(raw), dict):
        return raw
    return json.dumps(arguments, ensure_ascii=False)


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def tool_line(tool: Tool) -> str:
    """One tool's declaration as a line of JSON."""
    value = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return json.dumps(value, ensure_ascii=False)


def result_text(message: Message, open_calls: Sequence[ToolCall]) -> str:
    """A tool's result; after several calls at once, a first line `[1] name` says which one it answers."""
    ids = [call.id for call in open_calls]
    if len(ids) < 2 or message.tool_call_id not in ids:
        return message.content
    number = ids.index(message.tool_call_id)
    return f"[{number + 1}] {open_calls[number].name}\n{message.content}"
