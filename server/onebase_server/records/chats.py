"""Rows of stored chats and of what people thought of them. Knows nothing of training: it only finds and counts."""

from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import Select, delete, select

from onebase_server.records.database import Database
from onebase_server.records.pages import MetadataFilter, Order, Page, metadata_is, page
from onebase_server.records.tables import ChatRow, FeedbackRow

BATCH = 200


class ChatRecords:
    """The stored_chats and feedback tables. `owner=None` sees every row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, row: ChatRow) -> None:
        async with self._database.write() as session:
            session.add(row)

    async def get(self, chat_id: str, owner: str | None) -> ChatRow | None:
        async with self._database.read() as session:
            return await session.scalar(_one(chat_id, owner))

    async def list(
        self,
        owner: str | None,
        *,
        model: str | None,
        metadata: MetadataFilter | None,
        after: str | None,
        limit: int,
        order: Order,
    ) -> Page[ChatRow]:
        query = select(ChatRow)
        if owner is not None:
            query = query.where(ChatRow.owner == owner)
        if model is not None:
            query = query.where(ChatRow.model == model)
        async with self._database.read() as session:
            if metadata is not None:
                query = query.where(*metadata_is(session, ChatRow.meta, metadata))
            return await page(session, query, ChatRow, after=after, limit=limit, order=order)

    async def set_metadata(self, chat_id: str, owner: str | None, metadata: dict[str, Any] | None) -> ChatRow | None:
        async with self._database.write() as session:
            row = await session.scalar(_one(chat_id, owner))
            if row is not None:
                row.meta = metadata
        return row

    async def delete(self, chat_id: str, owner: str | None) -> bool:
        """Forget the chat and its feedback. False when there was none."""
        query = delete(ChatRow).where(ChatRow.id == chat_id)
        if owner is not None:
            query = query.where(ChatRow.owner == owner)
        async with self._database.write() as session:
            return (await session.scalars(query.returning(ChatRow.id))).first() is not None

    async def judge(self, feedback: FeedbackRow, owner: str | None) -> ChatRow | None:
        """Keep the judgement and make it the chat's current one. None when there is no such chat."""
        async with self._database.write() as session:
            chat = await session.scalar(_one(feedback.chat_id, owner).with_for_update())
            if chat is not None:
                session.add(feedback)
                chat.rating, chat.better_answer = feedback.rating, feedback.better_answer
        return chat

    async def worth_learning(self, adapter: str, owner: str | None) -> AsyncIterator[ChatRow]:
        """The adapter's chats that were marked good or were given a better answer, oldest first."""
        query = select(ChatRow).where(
            ChatRow.adapter == adapter, (ChatRow.rating == "good") | ChatRow.better_answer.is_not(None)
        )
        if owner is not None:
            query = query.where(ChatRow.owner == owner)
        last = 0
        while True:
            async with self._database.read() as session:
                batch = query.where(ChatRow.seq > last).order_by(ChatRow.seq).limit(BATCH)
                rows = (await session.scalars(batch)).all()
            for row in rows:
                yield row
            if len(rows) < BATCH:
                return
            last = rows[-1].seq


def _one(chat_id: str, owner: str | None) -> Select[ChatRow]:
    query = select(ChatRow).where(ChatRow.id == chat_id)
    return query if owner is None else query.where(ChatRow.owner == owner)
