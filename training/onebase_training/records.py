"""One record of a dataset -> a conversation or a plain text. Knows every line format; knows no file, no token.

Formats: ShareGPT/Vicuna (`conversations`), OpenAI chat (`messages`, `tools`, `weight`), Alpaca, OpenOrca,
prompt/completion, plain `text`. A wrong record raises RecordError, whose text says what to mend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from onebase.messages import ROLES, Message, Role, Tool
from onebase_training.record_parts import (
    RecordError,
    content_text,
    list_of_turns,
    optional_text,
    text_of,
    tool_calls_of,
    tools_of,
    weight_of,
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to render. `unknown` names speakers that are no role (the seed kept them): message index -> name."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    unknown: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text without turns: every token is learnt."""

    text: str


Record = Conversation | PlainText

_SPEAKERS: Final[Mapping[str, Role]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def detect_format(record: Mapping[str, Any]) -> str:
    """The format that a record's keys show. Raises RecordError naming the keys found and those that are known."""
    keys = set(record)
    for name, needed in _KEYS.items():
        if needed <= keys:
            return name
    raise RecordError(
        f"unknown format (keys {', '.join(sorted(map(str, keys))) or 'none'}); a record needs "
        + ", or ".join(f"{'+'.join(sorted(needed))} ({name})" for name, needed in _KEYS.items())
    )


def parse_record(record: object, format: str, *, keep_unknown_roles: bool = False) -> Record:
    """Raises RecordError. `format` may be `auto`."""
    if not isinstance(record, Mapping):
        raise RecordError(f"a record must be a JSON object, not {type(record).__name__}")
    name = detect_format(record) if format == "auto" else format
    missing = _KEYS[name] - set(record)
    if missing:
        raise RecordError(f"{', '.join(sorted(missing))} missing (format {name})")
    if name == "sharegpt":
        return _sharegpt(record, keep_unknown_roles)
    return _PARSERS[name](record)


def _sharegpt(record: Mapping[str, Any], keep_unknown_roles: bool) -> Conversation:
    turns = list_of_turns(record["conversations"], "conversations")
    messages, unknown = [], []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise RecordError(f"{where} must be an object with from and value")
        speaker, value = text_of(turn["from"], f"{where}.from"), text_of(turn["value"], f"{where}.value")
        role = _SPEAKERS.get(speaker.lower())
        if role is None:
            if not keep_unknown_roles:
                raise RecordError(f"{where}.from: unknown speaker {speaker!r}; use human, gpt, system or tool")
            unknown.append((index, speaker))
            role = "user"
        messages.append(Message(role, value, weight=weight_of(turn, where) if role == "assistant" else None))
    return _with_answer(Conversation(tuple(messages), tools_of(record), tuple(unknown)))


def _openai(record: Mapping[str, Any]) -> Conversation:
    messages = []
    for index, raw in enumerate(list_of_turns(record["messages"], "messages")):
        where = f"messages[{index}]"
        if not isinstance(raw, Mapping):
            raise RecordError(f"{where} must be an object with role and content")
        if "role" not in raw:
            raise RecordError(f"{where}.role is missing")
        role = raw["role"]
        if role not in ROLES:
            raise RecordError(f"{where}.role: unknown role {role!r}; use one of {', '.join(ROLES)}")
        calls = tool_calls_of(raw, where)
        content = raw.get("content")
        if content is None and not (role == "assistant" and (calls or raw.get("refusal"))):
            raise RecordError(f"{where}.content is missing")
        weight = weight_of(raw, where)
        if weight is not None and role != "assistant":
            raise RecordError(f"{where}.weight is only for assistant messages")
        messages.append(
            Message(
                role,
                content_text(content if content is not None else raw.get("refusal") or "", where),
                name=optional_text(raw, "name", where),
                tool_calls=calls,
                tool_call_id=optional_text(raw, "tool_call_id", where),
                weight=weight,
            )
        )
    return _with_answer(Conversation(tuple(messages), tools_of(record)))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    instruction = text_of(record["instruction"], "instruction")
    context = text_of(record.get("input") or "", "input")
    answer = text_of(record["output"], "output")
    question = f"{instruction}\n\n{context}" if context else instruction
    return Conversation((Message("user", question), Message("assistant", answer)))


def _orca(record: Mapping[str, Any]) -> Conversation:
    """The system message stays even when empty: the seed printed its header all the same."""
    return Conversation(
        (
            Message("system", text_of(record["system_prompt"] or "", "system_prompt")),
            Message("user", text_of(record["question"], "question")),
            Message("assistant", text_of(record["response"], "response")),
        )
    )


def _completion(record: Mapping[str, Any]) -> Conversation:
    prompt, answer = text_of(record["prompt"], "prompt"), text_of(record["completion"], "completion")
    return Conversation((Message("user", prompt), Message("assistant", answer)))


def _plain(record: Mapping[str, Any]) -> PlainText:
    return PlainText(text_of(record["text"], "text"))


_KEYS: Final[Mapping[str, frozenset[str]]] = {
    "openai": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "orca": frozenset({"system_prompt", "question", "response"}),
    "completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
_PARSERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Record]]] = {
    "openai": _openai,
    "alpaca": _alpaca,
    "orca": _orca,
    "completion": _completion,
    "text": _plain,
}


def _with_answer(conversation: Conversation) -> Conversation:
    if not any(message.is_supervised for message in conversation.messages):
        raise RecordError("no assistant message to learn from")
    return conversation
