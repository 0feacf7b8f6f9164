"""What a prompt format is, to those who use one: the protocol, and the value that training gets.

No format is known here; `prompt.py` has the table of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from onebase.errors import InvalidInput
from onebase.messages import Message, Tool
from onebase.tokenizer import TextTokenizer

PromptFormat = Literal["human_response", "chat_template"]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as training sees it. `ids` and `mask` have equal length.

    `mask` is True on the tokens that are learnt: each supervised response and the end token behind it. `skipped`
    holds the indices of assistant messages that should have been learnt but which the format shows differently in
    a history than it prompts for (some chat templates do); they stay in the context, unlearnt.
    """

    ids: list[int]
    mask: list[bool]
    skipped: tuple[int, ...] = ()


class CallLayout(NamedTuple):
    """What opens a block of calls, stands between two, and closes it. A call is `{"name": ..., "arguments": {...}}`."""

    before: str
    between: str
    after: str
    own_paragraph: bool = False
    """The opening is one only at the answer's start and behind an empty line."""


class PromptRenderer(Protocol):
    """One format on one tokenizer. Stateless and thread-safe; the same object serves and trains.

    Laws (tests/core/test_prompt_laws.py): an example split at its mask is prompt + completion, token for token; the
    next turn's prompt extends this turn's prompt + completion; `parse` inverts `render_completion`.
    """

    @property
    def format(self) -> PromptFormat:
        """The name that a version's manifest records."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that it renders with."""
        ...

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids to generate from: bos (if any), all messages, and the head of a new answer."""
        ...

    def render_completion(self, message: Message) -> list[int]:
        """Ids that a perfect model generates for this assistant message, end token included."""
        ...

    def render_example(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Example:
        """Ids and mask to train on. The mask may be all False; whether that is an error, the caller knows."""
        ...

    def render_text(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The conversation as one text, end tokens spelt out, without bos. For people and for seed-exact mode."""
        ...

    @property
    def call_layout(self) -> CallLayout | None:
        """How tool calls stand in generated text; None if the format has none. For those who stream or constrain."""
        ...

    def stop_sequences(self) -> tuple[str, ...]:
        """Texts that end a generation. Where several match, the one that starts first (the longest) counts."""
        ...

    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end a generation: the tokenizer's eos ids and the format's own end token."""
        ...

    def parse(self, ids: Sequence[int]) -> Message:
        """The assistant message of generated ids. An end token ends it; without one the first stop sequence does."""
        ...

    def parse_text(self, text: str) -> Message:
        """The same from generated text whose end token or stop sequence is already cut off."""
        ...


def require_messages(messages: Sequence[Message]) -> None:
    """Raises InvalidInput for an empty conversation."""
    if not messages:
        raise InvalidInput("messages must hold at least one message", param="messages")


def until_end(ids: Sequence[int], ends: frozenset[int]) -> tuple[list[int], bool]:
    """The ids before the first end token, and whether there was one."""
    for position, token_id in enumerate(ids):
        if token_id in ends:
            return list(ids[:position]), True
    return list(ids), False


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the earliest stop sequence."""
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text
