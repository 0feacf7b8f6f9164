"""One record of a dataset -> a conversation or a plain text. Knows every line format; knows no file, no token.

Formats: ShareGPT/Vicuna (`conversations`), OpenAI chat (`messages`, `tools`, `weight`), Alpaca, OpenOrca,
prompt/completion, plain `text`. A wrong record raises RecordError, whose text says what to mend.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from onebase.messages import ROLES, Message, Role, Tool, ToolCall


class RecordError(ValueError):
    """What is wrong with one record, without its place in the file."""


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
    turns = _list(record["conversations"], "conversations")
    messages, unknown = [], []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise RecordError(f"{where} must be an object with from and value")
        speaker, value = _text(turn["from"], f"{where}.from"), _text(turn["value"], f"{where}.value")
        role = _SPEAKERS.get(speaker.lower())
        if role is None:
            if not keep_unknown_roles:
                raise RecordError(f"{where}.from: unknown speaker {speaker!r}; use human, gpt, system or tool")
            unknown.append((index, speaker))
            role = "user"
        messages.append(Message(role, value, weight=_weight(turn, where) if role == "assistant" else None))
    return _with_answer(Conversation(tuple(messages), _tools(record), tuple(unknown)))


def _openai(record: Mapping[str, Any]) -> Conversation:
    messages = []
    for index, raw in enumerate(_list(record["messages"], "messages")):
        where = f"messages[{index}]"
        if not isinstance(raw, Mapping):
            raise RecordError(f"{where} must be an object with role and content")
        if "role" not in raw:
            raise RecordError(f"{where}.role is missing")
        role = raw["role"]
        if role not in ROLES:
            raise RecordError(f"{where}.role: unknown role {role!r}; use one of {', '.join(ROLES)}")
        calls = _tool_calls(raw, where)
        content = raw.get("content")
        if content is None and not (role == "assistant" and (calls or raw.get("refusal"))):
            raise RecordError(f"{where}.content is missing")
        weight = _weight(raw, where)
        if weight is not None and role != "assistant":
            raise RecordError(f"{where}.weight is only for assistant messages")
        messages.append(
            Message(
                role,
                _content(content if content is not None else raw.get("refusal") or "", where),
                name=raw.get("name"),
                tool_calls=calls,
                tool_call_id=raw.get("tool_call_id"),
                weight=weight,
            )
        )
    return _with_answer(Conversation(tuple(messages), _tools(record)))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    instruction = _text(record["instruction"], "instruction")
    context = _text(record.get("input") or "", "input")
    answer = _text(record["output"], "output")
    question = f"{instruction}\n\n{context}" if context else instruction
    return Conversation((Message("user", question), Message("assistant", answer)))


def _orca(record: Mapping[str, Any]) -> Conversation:
    """The system message stays even when empty: the seed printed its header all the same."""
    return Conversation(
        (
            Message("system", _text(record["system_prompt"] or "", "system_prompt")),
            Message("user", _text(record["question"], "question")),
            Message("assistant", _text(record["response"], "response")),
        )
    )


def _completion(record: Mapping[str, Any]) -> Conversation:
    prompt, answer = _text(record["prompt"], "prompt"), _text(record["completion"], "completion")
    return Conversation((Message("user", prompt), Message("assistant", answer)))


def _plain(record: Mapping[str, Any]) -> PlainText:
    return PlainText(_text(record["text"], "text"))


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


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{where} must be a list with at least one message")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where} must be a string, not {type(value).__name__}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise RecordError(f"{where} holds half of a surrogate pair, which is no character")
    return value


def _content(value: object, where: str) -> str:
    """A string, or OpenAI's list of text parts."""
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise RecordError(f"{where}.content[{index}]: only parts of type text can be learnt")
            parts.append(_text(part.get("text"), f"{where}.content[{index}].text"))
        return "".join(parts)
    return _text(value, f"{where}.content")


def _weight(raw: Mapping[str, Any], where: str) -> float | None:
    weight = raw.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RecordError(f"{where}.weight must be 0 or 1, not {weight!r}")
    return float(weight)


def _tool_calls(raw: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    calls = raw.get("tool_calls") or ()
    legacy = raw.get("function_call")
    if legacy is not None:
        calls = [{"id": "", "function": legacy}]
    result = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError(f"{where}.tool_calls[{index}] needs function.name and function.arguments")
        arguments = function.get("arguments", "{}")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        result.append(ToolCall(str(call.get("id") or ""), function["name"], text))
    return tuple(result)


def _tools(record: Mapping[str, Any]) -> tuple[Tool, ...]:
    functions = [tool.get("function") if isinstance(tool, Mapping) else None for tool in record.get("tools") or ()]
    functions += list(record.get("functions") or ())
    result = []
    for index, function in enumerate(functions):
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError(f"tools[{index}] needs function.name")
        result.append(Tool(function["name"], function.get("description") or "", function.get("parameters") or {}))
    return tuple(result)
