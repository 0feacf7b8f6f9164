"""The checked parts of a record: texts, weights, tools and calls. Each raises RecordError naming the place."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from onebase.messages import Tool, ToolCall

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class RecordError(ValueError):
    """What is wrong with one record, without its place in the file."""


def list_of_turns(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{where} must be a list with at least one message")
    return value


def text_of(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where} must be a string, not {type(value).__name__}")
    if _SURROGATE.search(value):
        raise RecordError(f"{where} holds half of a surrogate pair, which is no character")
    return value


def optional_text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if raw.get(key) is None else text_of(raw[key], f"{where}.{key}")


def optional_list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """An optional list."""
    value = raw.get(key)
    if value is not None and not isinstance(value, list):
        raise RecordError(f"{where}{key} must be a list, not {type(value).__name__}")
    return value or []


def content_text(value: object, where: str) -> str:
    """A string, or OpenAI's list of text parts."""
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise RecordError(f"{where}.content[{index}]: only parts of type text can be learnt")
            parts.append(text_of(part.get("text"), f"{where}.content[{index}].text"))
        return "".join(parts)
    return text_of(value, f"{where}.content")


def weight_of(raw: Mapping[str, Any], where: str) -> float | None:
    weight = raw.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RecordError(f"{where}.weight must be 0 or 1, not {weight!r}")
    return float(weight)


def tool_calls_of(raw: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    calls = optional_list(raw, "tool_calls", f"{where}.")
    legacy = raw.get("function_call")
    if legacy is not None:
        calls = [{"id": "", "function": legacy}]
    result = []
    for index, call in enumerate(calls):
        at = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError(f"{at} needs function.name and function.arguments")
        arguments = function.get("arguments", "{}")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = text_of(function["name"], f"{at}.function.name")
        result.append(ToolCall(str(call.get("id") or ""), name, text_of(text, f"{at}.function.arguments")))
    return tuple(result)


def tools_of(record: Mapping[str, Any]) -> tuple[Tool, ...]:
    functions = [
        tool.get("function") if isinstance(tool, Mapping) else None for tool in optional_list(record, "tools", "")
    ]
    functions += optional_list(record, "functions", "")
    result = []
    for index, function in enumerate(functions):
        at = f"tools[{index}]"
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError(f"{at} needs function.name")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise RecordError(f"{at}.function.parameters must be a JSON Schema object")
        text_of(json.dumps(parameters, ensure_ascii=False), f"{at}.function.parameters")
        result.append(
            Tool(
                text_of(function["name"], f"{at}.function.name"),
                optional_text(function, "description", f"{at}.function") or "",
                parameters,
            )
        )
    return tuple(result)
