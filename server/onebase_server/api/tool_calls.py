"""Tool calls on the way out: found in the generated text by the renderer, given ids, streamed in OpenAI's pieces."""

import re
import secrets
from collections.abc import Callable, Sequence

from onebase.messages import Message, ToolCall
from onebase_server.api.schemas_chat import FunctionCall, FunctionDelta, ToolCallBody, ToolCallDelta


def with_ids(calls: Sequence[ToolCall]) -> list[ToolCallBody]:
    """The calls for the wire. Their ids are the server's own: unique over requests, as clients expect."""
    return [
        ToolCallBody(
            id=f"call_{secrets.token_hex(12)}",
            type="function",
            function=FunctionCall.model_construct(name=call.name, arguments=call.arguments),
        )
        for call in calls
    ]


def call_deltas(calls: Sequence[ToolCall]) -> list[ToolCallDelta]:
    """Each call's head, then its arguments: the order that accumulators are written for."""
    deltas = []
    for index, call in enumerate(with_ids(calls)):
        head = FunctionDelta(name=call.function.name, arguments="")
        deltas.append(ToolCallDelta(index=index, id=call.id, type="function", function=head))
        body = FunctionDelta(arguments=call.function.arguments)
        deltas.append(ToolCallDelta(index=index, function=body))
    return deltas


class CallWatch:
    """Lets text through until a call may begin, and holds back the rest until the end shows what it was.

    `marker` is what a call begins with in the prompt format; "" means that the format has no calls.
    """

    def __init__(self, marker: str, parse: Callable[[str], Message]) -> None:
        self._parse = parse
        self._text = ""
        self._shown = 0
        self._holding = False
        partial = "|".join(re.escape(marker[:size]) for size in range(len(marker) - 1, 0, -1))
        # white space and # in front may belong to the call's block, and then they are no content
        self._call = re.compile(rf"[\s#]*{re.escape(marker)}") if marker else None
        self._maybe = re.compile(rf"[\s#]*(?:{partial})?\Z") if marker else None

    def feed(self, text: str) -> str:
        """What can be shown now."""
        self._text += text
        if self._holding:
            return ""
        end = len(self._text)
        if self._call is not None and self._maybe is not None:
            found = self._call.search(self._text, self._shown)
            self._holding = found is not None
            found = found or self._maybe.search(self._text, self._shown)
            end = found.start() if found else end
        shown, self._shown = self._text[self._shown : end], end
        return shown

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The content that is still to be shown, and the calls."""
        message = self._parse(self._text)
        return message.content[self._shown :], message.tool_calls
