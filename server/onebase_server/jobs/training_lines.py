"""OpenAI's training files, checked line by line in OpenAI's words, before any process is started for them.

Two checks: at upload, that every line is a JSON object; in a job's `validating_files`, that every line is an example
that this server can train on. Tokens, lengths and templates are the trainer's business. One line is in memory at a
time.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Format = Literal["chat", "completion", "sharegpt"]
Example = dict[str, Any]

MIN_EXAMPLES = 10
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = ("system", "human", "user", "gpt", "assistant", "chatgpt")
MESSAGE_KEYS = {
    "role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", "refusal", "annotations",
    "audio",
}  # fmt: skip
LINE_LIMIT = 32 << 20
NOT_JSONL = "Expected file to have JSONL format, where every line is a valid JSON dictionary. "
UNEXPECTED = "Unexpected file format, expected either prompt/completion pairs or chat messages."
INVALID = "The job failed due to an invalid {kind} file. Invalid file format. "


class LineError(ValueError):
    """A line that is no JSON object; its text names the line."""


@dataclass(frozen=True, slots=True)
class FileProblem:
    """Why a file can't be trained on, as a job's `error` shows it."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class FileReport:
    """What a good file holds."""

    format: Format
    examples: int


def read_objects(path: Path) -> Iterator[tuple[int, Example]]:
    """Each line that is not blank, with its number from 1. Raises LineError at the first that is no JSON object."""
    with path.open("rb") as lines:
        number = 0
        while raw := lines.readline(LINE_LIMIT + 1):
            number += 1
            if len(raw) > LINE_LIMIT:
                raise LineError(f"Line {number} is longer than {LINE_LIMIT} bytes.")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise LineError(f"Line {number} is not valid UTF-8.") from error
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "it can't be read"
                raise LineError(f"Line {number} is not valid JSON: {reason}.") from error
            if not isinstance(value, dict):
                raise LineError(f"Line {number} is not a JSON dictionary.")
            yield number, value


def find_broken_line(path: Path) -> str | None:
    """The upload check: OpenAI's text for the first line that is no JSON object, or for a file without lines."""
    count = 0
    try:
        for _ in read_objects(path):
            count += 1
    except LineError as error:
        return NOT_JSONL + str(error)
    return None if count else NOT_JSONL + "The file is empty."


def check_training_file(
    path: Path,
    *,
    kind: Literal["training", "validation"] = "training",
    minimum: int = MIN_EXAMPLES,
    go_on: Callable[[None], None] = lambda _: None,
) -> FileReport | FileProblem:
    """The job's check. `minimum` is OpenAI's least number of examples; a validation file needs one. `go_on` is called
    at each line, and may raise to end it."""
    code, prefix = f"invalid_{kind}_file", INVALID.format(kind=kind)
    form: Format | None = None
    count = 0
    try:
        for number, example in read_objects(path):
            count += 1
            go_on(None)
            if form is None:
                found = _format_of(example)
                if isinstance(found, FileProblem):
                    return found
                form = found
            problem = CHECKS[form](example)
            if problem is not None:
                line = "" if number == count else f" (line {number})"
                return FileProblem(code, f"{prefix}Example {count}{line}, {problem}")
    except LineError as error:
        return FileProblem(code, prefix + str(error))
    if form is None:
        return FileProblem(code, f"{prefix}The file is empty.")
    if count < minimum:
        return FileProblem(
            "invalid_n_examples",
            f"{kind.capitalize()} file has {count} example(s), but must have at least {minimum} examples",
        )
    return FileReport(form, count)


def _format_of(example: Example) -> Format | FileProblem:
    if "messages" in example:
        return "chat"
    if "prompt" in example and "completion" in example:
        return "completion"
    if "conversations" in example:
        return "sharegpt"
    if "input" in example and any(key.startswith(("preferred_", "non_preferred_")) for key in example):
        return FileProblem(
            "invalid_file_format",
            "The input file is in the fine-tune-preference format, but the specified fine-tuning job is using "
            "'supervised'. Preference tuning is not offered here.",
        )
    return FileProblem("invalid_file_format", UNEXPECTED)


def _check_chat(example: Example) -> str | None:
    messages = example.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages must be a list of at least one message"
    for position, message in enumerate(messages, 1):
        problem = _check_message(message)
        if problem is not None:
            return f"message {position} {problem}"
    assistants = [message for message in messages if message["role"] == "assistant"]
    if not assistants:
        return "there must be at least one message from the assistant"
    if messages[-1]["role"] != "assistant":
        return "the last message must be from the assistant"
    if all(message.get("weight") == 0 for message in assistants):
        return "every assistant message has weight 0, so there is nothing to learn"
    for key in ("tools", "functions"):
        if not isinstance(example.get(key, []), list):
            return f"{key} must be a list"
    return None


def _check_message(message: Any) -> str | None:
    if not isinstance(message, dict):
        return "is not a dictionary"
    if "role" not in message:
        return "Discriminator 'role' is missing in value"
    role = message["role"]
    if role not in ROLES:
        return f"has the unrecognized role {role!r}; use one of {', '.join(ROLES)}"
    unknown = sorted(set(message) - MESSAGE_KEYS)
    if unknown:
        return f"has the unrecognized key '{unknown[0]}'"
    if "weight" in message and message["weight"] is not None:
        if role != "assistant":
            return "has a weight, which only assistant messages may have"
        if message["weight"] not in (0, 1) or isinstance(message["weight"], bool):
            return "has a weight that is neither 0 nor 1"
    calls = message.get("tool_calls") or message.get("function_call")
    content = message.get("content")
    if content is None and role == "assistant" and calls:
        return None
    if isinstance(content, str):
        return None
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        return None
    return "is missing content" if content is None else "has content that is neither a string nor text parts"


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_completion(example: Example) -> str | None:
    for key in ("prompt", "completion"):
        if not isinstance(example.get(key), str):
            return f"'{key}' must be a string"
    return None if example["completion"] else "'completion' is empty, so there is nothing to learn"


def _check_sharegpt(example: Example) -> str | None:
    turns = example.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "conversations must be a list of at least one turn"
    for position, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return f"turn {position} needs a 'from' and a 'value'"
        if turn.get("from") not in SHAREGPT_ROLES:
            return f"turn {position} has the unrecognized speaker {turn.get('from')!r}"
    if all(turn["from"] in ("system", "human", "user") for turn in turns):
        return "there must be at least one turn from the assistant"
    return None


CHECKS: dict[Format, Callable[[Example], str | None]] = {
    "chat": _check_chat,
    "completion": _check_completion,
    "sharegpt": _check_sharegpt,
}
