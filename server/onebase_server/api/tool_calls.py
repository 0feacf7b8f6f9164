"""Tool calls on the way out: read from the generated text piece by piece as it comes, and given ids.

Once a call is opened, decoding is constrained (`structured.py`): what follows has the layout of the format.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onebase.messages import Message, ToolCall
from onebase.prompt_types import CallLayout
from onebase_server.api.schemas_chat import FunctionCall, ToolCallBody
from onebase_server.engine.grammar_llguidance import call_head

HEAD = re.compile(r"[^{]*" + re.escape(call_head("\0")).replace(re.escape("\0"), '([^"]+)'))
"""What stands between two calls, and a call up to its arguments."""
MARKS = re.compile(r'\\(?:.|\Z)|["{}]', re.DOTALL)
"""What tells where a JSON object ends; an escape that is not all there is one that waits."""


def new_call_id() -> str:
    """The server's own: unique over requests, as clients expect."""
    return f"call_{secrets.token_hex(12)}"


def call_body(call_id: str, name: str, arguments: str) -> ToolCallBody:
    function = FunctionCall.model_construct(name=name, arguments=arguments)
    return ToolCallBody(id=call_id, type="function", function=function)


def with_ids(calls: Sequence[ToolCall]) -> list[ToolCallBody]:
    """The calls for the wire."""
    return [call_body(new_call_id(), call.name, call.arguments) for call in calls]


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer goes on with: content, or a call's head, or more of the arguments of the call last opened."""

    text: str
    end: int
    """Characters of the generated text that all up to it stands for."""
    call: int | None = None
    """Which call; None: it is content."""
    name: str | None = None
    """Of a head, which has no text."""


class CallReader:
    """Generated text -> content and calls. Text is let through until a call may begin, and held until it is clear.

    A call that a limit cut is one as soon as its arguments have begun. Cut before, the first is text, and one behind
    another is left out. `layout` None: the format has no calls, all is content.
    """

    def __init__(self, layout: CallLayout | None, parse: Callable[[str], Message]) -> None:
        self._parse = parse
        self._text = ""
        self._at = 0
        """Characters of `_text` that are done with: shown, or not to be shown."""
        self._arguments = _Object()
        self.calls: list[ToolCall] = []
        """As far as they are there; their ids are not."""
        self._marker = layout.before.rstrip() if layout else ""
        self._own_paragraph = layout is not None and layout.own_paragraph
        self._held = False
        """The marker has come: as a call's opening or as text that looks alike."""
        self._looked = 0
        self._opening: tuple[int, int] | None = None
        """Where the block of calls begins, white space in front of it and all, and where its opening ends."""

    @property
    def is_cut(self) -> bool:
        """The arguments of the last call are not complete."""
        return bool(self.calls) and self._arguments.is_open

    def feed(self, text: str) -> list[Piece]:
        """What has become clear."""
        self._text += text
        if self._opening is None:
            shown = self._show()
            return [*self._content(shown), *(self._read_calls() if self._opening else ())]
        return self._read_calls()

    def finish(self) -> list[Piece]:
        """What is left, at the answer's end."""
        if self.calls:
            rest = self._text[self._at :] if self._arguments.is_open else ""
            self._at = len(self._text)
            return [self._more(rest)] if rest else []
        rest = self._parse(self._text).content[self._at :]
        self._at = len(self._text)
        return self._content(rest)

    def _show(self) -> str:
        """The content that can be shown now. Looks for the opening of a call, too."""
        text, marker = self._text, self._marker
        end = self._at if self._held else len(text)
        if marker and not self._held:
            place = text.find(marker, self._at)
            self._held = place >= 0
            end = self._content_end(place if self._held else len(text) - partial(text, marker))
        if self._held:
            self._find_opening()
        shown, self._at = text[self._at : end], end
        return shown

    def _content_end(self, place: int) -> int:
        """If a call's opening is at `place`: the white space in front of it is the call's."""
        rest = self._text[self._at : place]
        if self._own_paragraph:
            return place - (2 if rest.endswith("\n\n") else rest.endswith("\n"))
        return self._at + len(rest.rstrip())

    def _find_opening(self) -> None:
        text, marker = self._text, self._marker
        if not self._own_paragraph:
            place = text.find(marker, self._at)
            self._opening = (self._content_end(place), place + len(marker))
        elif text.startswith(marker):
            self._opening = (0, len(marker))
        else:
            paragraph = "\n\n" + marker
            place = text.find(paragraph, self._looked)
            self._looked = max(0, len(text) - len(paragraph))
            if place >= 0:
                self._opening = (place, place + len(paragraph))

    def _read_calls(self) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            if self._arguments.is_open:
                end = self._arguments.scan(self._text, self._at)
                if end > self._at:
                    rest, self._at = self._text[self._at : end], end
                    pieces.append(self._more(rest))
                if self._arguments.is_open:
                    return pieces
            assert self._opening is not None
            begin, opened = self._opening
            head = HEAD.match(self._text, self._at if self.calls else opened)
            if head is None:
                return pieces
            if not self.calls:
                rest = self._parse(self._text[:begin]).content[self._at :]
                self._at = begin
                pieces += self._content(rest)
            self._at = head.end()
            self._arguments = _Object(is_open=True)
            self.calls.append(ToolCall("", head[1], ""))
            pieces.append(Piece("", self._at, len(self.calls) - 1, head[1]))

    def _content(self, text: str) -> list[Piece]:
        return [Piece(text, self._at)] if text else []

    def _more(self, arguments: str) -> Piece:
        last = self.calls[-1]
        self.calls[-1] = ToolCall("", last.name, last.arguments + arguments)
        return Piece(arguments, self._at, len(self.calls) - 1)


def partial(text: str, marker: str) -> int:
    """So many characters at the text's end may be the beginning of the marker."""
    return next((size for size in range(len(marker) - 1, 0, -1) if text.endswith(marker[:size])), 0)


@dataclass(slots=True)
class _Object:
    """How far a JSON object has got that comes in pieces."""

    is_open: bool = False
    _depth: int = field(default=0)
    _in_string: bool = field(default=False)

    def scan(self, text: str, begin: int) -> int:
        """Where the object ends, or how far it goes in `text` as far as that is there."""
        for mark in MARKS.finditer(text, begin):
            if mark[0] == "\\":
                return mark.start()
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string and mark[0] in "{}":
                self._depth += 1 if mark[0] == "{" else -1
                if not self._depth:
                    self.is_open = False
                    return mark.end()
        return len(text)


def read_answer(text: str, layout: CallLayout | None, parse: Callable[[str], Message]) -> tuple[str, list[ToolCall]]:
    """A whole answer's content and calls: what its pieces add up to."""
    reader = CallReader(layout, parse)
    pieces = reader.feed(text) + reader.finish()
    return "".join(piece.text for piece in pieces if piece.call is None), reader.calls
