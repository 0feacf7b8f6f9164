"""The `chat_template` format: a base's own Jinja template, with contents that cannot forge a control token.

The template is rendered (sandboxed) with a placeholder in place of each content, cut there, and encoded piece by
piece: the template's own text may hold special tokens, a content may not. The prompt of an answer is what the
template writes in front of it, so prompt and training example agree by construction.
Not known here: which models exist. What a template must do is in docs/prompt.md.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from onebase.errors import InvalidInput
from onebase.messages import Message, Tool, ToolCall
from onebase.prompt_types import CallLayout, Example, PromptFormat, require_messages, until_end
from onebase.template_environment import template_environment
from onebase.tokenizer import TextTokenizer

HERMES = CallLayout("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")
"""As Hermes and Qwen templates write calls."""
_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class ChatTemplateRenderer:
    """A base's template on its tokenizer. Raises InvalidInput if the template can't be used at all."""

    format: PromptFormat = "chat_template"

    def __init__(self, tokenizer: TextTokenizer, chat_template: str) -> None:
        self.tokenizer = tokenizer
        self._source = chat_template
        try:
            self._template = template_environment().from_string(chat_template)
        except TemplateError as error:
            raise InvalidInput(f"the chat template does not parse: {error}", param="chat_template") from error
        self._nonce = secrets.token_hex(8)
        self._holder = re.compile(rf"⟦{self._nonce}:(\d+)⟧")
        self._end_id = self._find_end_id()

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        require_messages(messages)
        return self._prompt(messages, tools)

    def render_completion(self, message: Message) -> list[int]:
        if not message.tool_calls:
            return [*self.tokenizer.encode(message.content), self._end_id]
        # The template alone knows how calls are written: take them from a conversation of their own.
        asked = [Message("user", "x"), message]
        prompt = self._prompt(asked[:1], ())
        ids = self._encode(asked, ())
        return self._up_to_end(ids[len(prompt) :])

    def render_example(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Example:
        require_messages(messages)
        ids = self._encode(messages, tools)
        mask = [False] * len(ids)
        skipped = []
        for position, message in enumerate(messages):
            if not message.is_supervised:
                continue
            prompt = self._prompt(messages[:position], tools)
            completion = self._up_to_end(ids[len(prompt) :])
            if ids[: len(prompt)] != prompt or not self._is_whole(completion, message):
                skipped.append(position)
                continue
            mask[len(prompt) : len(prompt) + len(completion)] = [True] * len(completion)
        return Example(ids, mask, tuple(skipped))

    def render_text(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        return "".join(text for text, _ in self._pieces(messages, tools))

    @property
    def call_layout(self) -> CallLayout | None:
        return HERMES if "<tool_call>" in self._source else None

    def stop_sequences(self) -> tuple[str, ...]:
        return ()

    def stop_token_ids(self) -> frozenset[int]:
        return self.tokenizer.eos_ids | {self._end_id}

    def parse(self, ids: Sequence[int]) -> Message:
        body, _ = until_end(ids, self.stop_token_ids())
        return self.parse_text(self.tokenizer.decode(body))

    def parse_text(self, text: str) -> Message:
        """Calls are read in the `<tool_call>` form (Hermes, Qwen), and only if the template writes that form."""
        calls = _read_calls(text) if "<tool_call>" in self._source else ()
        content = text[: text.index("<tool_call>")].rstrip() if calls else text
        return Message("assistant", content, tool_calls=calls)

    def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """What the template writes in front of an answer's content: its generation prompt by another way."""
        pieces = self._pieces([*messages, Message("assistant", "x")], tools)
        return self._encode_pieces(pieces[: _last_content(pieces)])

    def _encode(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        return self._encode_pieces(self._pieces(messages, tools))

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        tokenizer = self.tokenizer
        ids: list[int] = []
        first = True
        for text, is_content in pieces:
            encode = tokenizer.encode if is_content else tokenizer.encode_with_specials
            ids += encode(text, first)
            first = first and not text
        if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def _pieces(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[tuple[str, bool]]:
        """(text, is_content) in order. White space between an answer and its end token is dropped."""
        contents: list[str] = []
        text = self._render(self._values(messages, contents), self._tool_values(tools, contents))
        parts = self._holder.split(text)
        shown = {int(number) for number in parts[1::2]}
        lost = [i for i in range(len(messages)) if self._has_holder(messages[i]) and i not in shown]
        if lost:
            raise InvalidInput(
                f"the base's chat template leaves out messages[{lost[0]}] (role {messages[lost[0]].role})",
                param=f"messages[{lost[0]}]",
            )
        pieces: list[tuple[str, bool]] = []
        for position, part in enumerate(parts):
            if position % 2:
                pieces.append((contents[int(part)], True))
            else:
                after_answer = position and self._is_answer(messages, int(parts[position - 1]))
                pieces.append((self._without_gap(part) if after_answer else part, False))
        return pieces

    def _values(self, messages: Sequence[Message], contents: list[str]) -> list[dict[str, Any]]:
        """The messages as the template sees them; holder i stands for messages[i].content."""
        contents += [message.content for message in messages]
        values = []
        for i, message in enumerate(messages):
            content = self._hold(i) if self._has_holder(message) else ""
            role = "system" if message.is_system else message.role
            value: dict[str, Any] = {"role": role, "content": content}
            if message.name is not None:
                value["name"] = self._disarm(message.name, contents)
            if message.tool_call_id is not None:
                value["tool_call_id"] = self._disarm(message.tool_call_id, contents)
            if message.tool_calls:
                value["tool_calls"] = [self._call_value(call, contents) for call in message.tool_calls]
            values.append(value)
        return values

    def _call_value(self, call: ToolCall, contents: list[str]) -> dict[str, Any]:
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):
            arguments = call.arguments
        function = {"name": call.name, "arguments": arguments}
        return {
            "type": "function",
            "id": self._disarm(call.id, contents),
            "function": self._disarm(function, contents),
        }

    def _tool_values(self, tools: Sequence[Tool], contents: list[str]) -> list[dict[str, Any]] | None:
        if not tools:
            return None
        if "tools" not in self._source:
            raise InvalidInput("this base's chat template has no tools", param="tools")
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)} for tool in tools
        ]
        return [{"type": "function", "function": self._disarm(f, contents)} for f in functions]

    def _disarm(self, value: Any, contents: list[str]) -> Any:
        """`value` with a holder for every string in it that spells a special token; the rest stays readable."""
        if isinstance(value, str):
            if not self.tokenizer.spells_special(value):
                return value
            # Inside the template's JSON the text must be escaped as JSON would.
            contents.append(json.dumps(value, ensure_ascii=False)[1:-1])
            return self._hold(len(contents) - 1)
        if isinstance(value, Mapping):
            return {self._disarm(k, contents): self._disarm(v, contents) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._disarm(item, contents) for item in value]
        return value

    def _hold(self, number: int) -> str:
        return f"⟦{self._nonce}:{number}⟧"

    @staticmethod
    def _has_holder(message: Message) -> bool:
        """A template asks `if message.content` of messages that only call tools: "" must stay false there."""
        return bool(message.content) or not message.tool_calls

    @staticmethod
    def _is_answer(messages: Sequence[Message], number: int) -> bool:
        return number < len(messages) and messages[number].role == "assistant"

    def _without_gap(self, piece: str) -> str:
        """`piece` without white space in front of its end token (Llama 2's `answer </s>`)."""
        stripped = piece.lstrip()
        ids = self.tokenizer.encode_with_specials(stripped[:64])
        return stripped if ids and self.tokenizer.is_special(ids[0]) else piece

    def _up_to_end(self, ids: list[int]) -> list[int]:
        """The completion: up to the end token, itself included. [] if there is none."""
        return ids[: ids.index(self._end_id) + 1] if self._end_id in ids else []

    def _is_whole(self, completion: list[int], message: Message) -> bool:
        """The template shows the answer as it is generated: content, then the end token, nothing between."""
        if message.tool_calls:
            return bool(completion)
        return completion == [*self.tokenizer.encode(message.content), self._end_id]

    def _find_end_id(self) -> int:
        """The special token that the template writes behind an answer."""
        pieces = self._pieces([Message("user", "x"), Message("assistant", "y")], ())
        tail = "".join(text for text, _ in pieces[_last_content(pieces) + 1 :])
        ids = self.tokenizer.encode_with_specials(tail)
        if not ids or not self.tokenizer.is_special(ids[0]):
            raise InvalidInput(
                "the chat template writes no end token behind an answer, so a model could not learn to stop; "
                "use the human_response format",
                param="chat_template",
            )
        return ids[0]

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        bos = self.tokenizer.bos_token_text
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=False,
                enable_thinking=False,
                bos_token=bos,
                eos_token=self.tokenizer.token_text(self.tokenizer.eos_id),
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidInput(
                f"the base's chat template refuses this conversation: {error}", param="messages"
            ) from error


def _last_content(pieces: Sequence[tuple[str, bool]]) -> int:
    return max(i for i, (_, is_content) in enumerate(pieces) if is_content)


def _read_calls(text: str) -> tuple[ToolCall, ...]:
    """All `<tool_call>{json}</tool_call>` of a text; () if one of them is broken."""
    calls = []
    for number, match in enumerate(_TOOL_CALL.finditer(text)):
        try:
            call = json.loads(match[1])
        except (ValueError, RecursionError):
            return ()
        if not isinstance(call.get("name"), str) or "arguments" not in call:
            return ()
        arguments = call["arguments"]
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(f"call_{number}", call["name"], as_text))
    return tuple(calls)
