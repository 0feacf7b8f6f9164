"""`store: true`: keep an exchange as it was asked and answered. A streamed answer is put together from its own chunks.

Keeping never costs the client its answer: a record that can't be written is logged, and the answer goes out.
"""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from onebase_server.api.chat_plan import ChatPlan
from onebase_server.api.schemas_chat import ChatCompletion, ChatRequest
from onebase_server.records.chats import ChatRecords
from onebase_server.records.tables import ChatRow

logger = logging.getLogger(__name__)

DATA = b"data: "
END = b"\n\n"


class ChatKeeper:
    """For one exchange of one caller."""

    def __init__(self, chats: ChatRecords, owner: str, body: ChatRequest, plan: ChatPlan) -> None:
        self._chats = chats
        self._owner = owner
        self._body = body
        self._plan = plan

    async def keep(self, reply: ChatCompletion) -> None:
        await self._write(reply.model_dump(mode="json", exclude_unset=True))

    async def watch(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same events; what they told is kept once the last one is out. An unfinished stream is not kept."""
        whole: dict[str, Any] = {}
        async for piece in events:
            for event in piece.split(END)[:-1]:
                add_chunk(whole, json.loads(event.removeprefix(DATA)))
            yield piece
        if whole:
            await self._write(whole)

    async def _write(self, response: dict[str, Any]) -> None:
        adapter = self._plan.model.adapter
        request = self._body.model_dump(mode="json", exclude_unset=True, exclude={"metadata", "store", "stream"})
        row = ChatRow(
            id=self._plan.id,
            owner=self._owner,
            created_at=self._plan.created,
            model=self._plan.model.id,
            adapter=None if adapter is None else adapter.name,
            version=None if adapter is None else f"{adapter.name}@{adapter.version}",
            request=request,
            response=response,
            meta=self._body.metadata,
        )
        try:
            await self._chats.add(row)
        except SQLAlchemyError:
            logger.exception("chat %s could not be stored", self._plan.id)


def add_chunk(whole: dict[str, Any], chunk: dict[str, Any]) -> None:
    """Merge a streamed chunk into the reply that it is a part of, as OpenAI's clients do."""
    if not whole:
        whole.update({key: chunk[key] for key in ("id", "created", "model", "system_fingerprint")})
        whole |= {"object": "chat.completion", "choices": []}
    if chunk.get("usage"):
        whole["usage"] = chunk["usage"]
    for part in chunk["choices"]:
        choices = whole["choices"]
        while len(choices) <= part["index"]:
            empty = {"role": "assistant", "content": None, "refusal": None}
            choices.append({"index": len(choices), "message": empty, "logprobs": None, "finish_reason": None})
        choice, delta = choices[part["index"]], part["delta"]
        message = choice["message"]
        if delta.get("content") is not None:
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls") or []:
            add_call(message.setdefault("tool_calls", []), call)
        if part.get("logprobs"):
            kept = choice["logprobs"] or {"content": [], "refusal": None}
            choice["logprobs"] = {**kept, "content": kept["content"] + part["logprobs"]["content"]}
        choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]


def add_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    while len(calls) <= delta["index"]:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[delta["index"]], delta.get("function") or {}
    call["id"] = delta.get("id") or call["id"]
    for name in ("name", "arguments"):
        call["function"][name] += function.get(name) or ""
