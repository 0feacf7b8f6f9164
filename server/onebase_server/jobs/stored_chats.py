"""Stored chats that people found good -> a training file: the flywheel's last step. Knows no HTTP.

One line a chat: what was asked, and the answer to learn, which is the better one that somebody gave, or else the one
that was marked good. Everything before it is context only.
"""

import json
from pathlib import Path
from typing import Any

from onebase.errors import InvalidInput
from onebase_server.jobs.training_lines import MESSAGE_KEYS, MIN_EXAMPLES
from onebase_server.records.chats import ChatRecords
from onebase_server.records.tables import ChatRow


async def write_training_lines(path: Path, chats: ChatRecords, adapter: str, owner: str | None) -> int:
    """Write the file and say how many lines it has. Raises InvalidInput if they are too few to train on."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        async for chat in chats.worth_learning(adapter, owner):
            line = training_line(chat)
            if line is not None:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    if count < MIN_EXAMPLES:
        raise InvalidInput(
            f"{count} stored chat(s) of '{adapter}' are marked good or have a better answer; at least {MIN_EXAMPLES} "
            'are needed. Send chats with "store": true and mark them by POST /v1/feedback.',
            param="stored_chats",
            code="invalid_n_examples",
        )
    return count


def training_line(chat: ChatRow) -> dict[str, Any] | None:
    """None for a chat without an answer to learn, or one whose row is damaged."""
    answer = _answer(chat)
    if answer is None or not chat.request.get("messages"):
        return None
    before = [_context(message) for message in chat.request.get("messages", [])]
    line: dict[str, Any] = {"messages": [*before, answer]}
    if chat.request.get("tools"):
        line["tools"] = chat.request["tools"]
    return line


def _answer(chat: ChatRow) -> dict[str, Any] | None:
    if chat.better_answer is not None:
        return {"role": "assistant", "content": chat.better_answer}
    choices = chat.response.get("choices") or []
    if not choices or choices[0].get("finish_reason") not in ("stop", "tool_calls"):
        return None  # a cut answer teaches not to stop
    message = choices[0]["message"]
    kept = {key: message[key] for key in ("role", "content", "tool_calls") if message.get(key) is not None}
    return kept if "content" in kept or "tool_calls" in kept else None


def _context(message: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key in MESSAGE_KEYS and value is not None}
    return {**kept, "weight": 0} if kept.get("role") == "assistant" else kept
