"""The one renderer: messages -> token ids, and back. The only module that knows a header.

`human_response` is the seed article's format and the default; `chat_template` (chat_template.py) is for a base that
carries a template of its own. Training and serving call the same object, so they cannot drift apart.
docs/prompt.md shows both formats; docs/decisions/0002-prompt-borders.md says why the borders lie where they lie.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

from onebase.chat_template import ChatTemplateRenderer
from onebase.errors import InvalidInput
from onebase.messages import Message, Tool, ToolCall
from onebase.prompt_types import (
    CallLayout,
    Example,
    PromptFormat,
    PromptRenderer,
    cut_at_stop,
    require_messages,
    until_end,
)
from onebase.tokenizer import TextTokenizer
from onebase.tool_text import CallBlock, result_text, tool_line

__all__ = ["Example", "PromptFormat", "PromptRenderer", "get_renderer"]

SYSTEM = "### SYSTEM:\n"
TOOLS = "### TOOLS:\n"
HUMAN = "### HUMAN:\n"
RESPONSE = "### RESPONSE:\n"
TOOL = "### TOOL:\n"
CALL = "### CALL:"
TURN_END = "\n\n"

_FIXED = frozenset((SYSTEM, TOOLS, HUMAN, RESPONSE, TOOL, TURN_END))
_HEADERS = {"system": SYSTEM, "developer": SYSTEM, "user": HUMAN, "tool": TOOL, "function": TOOL}


def get_renderer(format: PromptFormat, tokenizer: TextTokenizer, chat_template: str | None = None) -> PromptRenderer:
    """The renderer that a manifest's `prompt_format` names. Raises InvalidInput for an unknown or unusable one."""
    if format == "human_response":
        return HumanResponseRenderer(tokenizer)
    if format == "chat_template":
        if not chat_template:
            raise InvalidInput("prompt format chat_template needs a base that has a chat template", param="format")
        return ChatTemplateRenderer(tokenizer, chat_template)
    raise InvalidInput(f"unknown prompt format {format!r}; use human_response or chat_template", param="format")


class HumanResponseRenderer:
    """The seed's format. Each turn is header | content | (eos) | blank line, and `|` are the encoding borders.

    A content is encoded alone and the eos is appended as an id, so neither can change its neighbours' tokens.
    """

    format: PromptFormat = "human_response"
    call_layout = CallLayout(CALL + "\n", "\n", "", own_paragraph=True)

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._calls = CallBlock(CALL)
        self._fixed = {(part, first): tokenizer.encode(part, first) for part in _FIXED for first in (False, True)}

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        require_messages(messages)
        return self._encode([*_turns(messages, tools, self._calls), [RESPONSE]]).ids

    def render_completion(self, message: Message) -> list[int]:
        return [*self.tokenizer.encode(self._calls.write(message)), self.tokenizer.eos_id]

    def render_example(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Example:
        require_messages(messages)
        return self._encode(_turns(messages, tools, self._calls))

    def render_text(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        eos = self.tokenizer.token_text(self.tokenizer.eos_id)
        turns = _turns(messages, tools, self._calls)
        return "".join(part if isinstance(part, str) else part.text + eos for turn in turns for part in turn)

    def stop_sequences(self) -> tuple[str, ...]:
        return self._stops

    def stop_token_ids(self) -> frozenset[int]:
        return self.tokenizer.eos_ids

    def parse(self, ids: Sequence[int]) -> Message:
        body, ended = until_end(ids, self.tokenizer.eos_ids)
        text = self.tokenizer.decode(body)
        return self.parse_text(text if ended else cut_at_stop(text, self._stops))

    def parse_text(self, text: str) -> Message:
        return self._calls.read(text)

    @cached_property
    def _stops(self) -> tuple[str, ...]:
        """The headers that only others may write, with the blank line in front so that it doesn't leak either."""
        headers = [header.rstrip("\n") for header in (HUMAN, TOOL)]
        return tuple(gap + header for gap in ("\n\n", "\n", "") for header in headers)

    def _encode(self, turns: "Sequence[_Turn] | Iterator[_Turn]") -> Example:
        """Ids and mask of the segments, bos first."""
        tokenizer = self.tokenizer
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        mask = [False] * len(ids)
        first = True
        for part in (part for turn in turns for part in turn):
            if isinstance(part, str):
                new, learnt = self._fixed.get((part, first)) or tokenizer.encode(part, first), False
            else:
                new, learnt = [*tokenizer.encode(part.text), tokenizer.eos_id], part.learnt
            ids += new
            mask += [learnt] * len(new)
            first = False
        return Example(ids, mask)


class _Response:
    """An assistant's text, which an eos follows."""

    __slots__ = ("learnt", "text")

    def __init__(self, text: str, learnt: bool) -> None:
        self.text = text
        self.learnt = learnt


_Turn = list[str | _Response]


def _turns(messages: Sequence[Message], tools: Sequence[Tool], calls: CallBlock) -> Iterator[_Turn]:
    """The segments of each turn. Tools are declared behind the leading system messages."""
    leading = next((i for i, message in enumerate(messages) if not message.is_system), len(messages))
    open_calls: tuple[ToolCall, ...] = ()
    for position, message in enumerate(messages):
        if position == leading and tools:
            yield [TOOLS, "\n".join(map(tool_line, tools)), TURN_END]
        if message.role == "assistant":
            open_calls = message.tool_calls
            yield [RESPONSE, _Response(calls.write(message), message.is_supervised), TURN_END]
        elif message.role in ("tool", "function"):
            yield [TOOL, result_text(message, open_calls), TURN_END]
        else:
            yield [_HEADERS[message.role], message.content, TURN_END]
    if leading == len(messages) and tools:
        yield [TOOLS, "\n".join(map(tool_line, tools)), TURN_END]
