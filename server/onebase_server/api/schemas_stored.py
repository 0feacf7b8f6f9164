"""Stored chats and feedback on the wire. A stored chat is the reply that was given, and its metadata."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from onebase_server.api.schemas_common import ListPage, Metadata, RequestBody, Wire, no_nul
from onebase_server.records.tables import ChatRow, FeedbackRow

# What of a request is shown with a stored chat, as OpenAI does.
SHOWN = (
    "tools", "tool_choice", "response_format", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty",
)  # fmt: skip


class StoredChat(Wire):
    """The chat completion as it was answered, with its metadata, and what was asked for."""

    model_config = ConfigDict(extra="allow", strict=False)

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None
    rating: Literal["good", "bad"] | None
    """Ours: the newest feedback."""
    better_answer: str | None
    version: str | None
    """Ours: the version that answered, `name@N`."""


class StoredChatList(ListPage):
    data: list[StoredChat]
    first_id: str | None
    last_id: str | None
    has_more: bool


class UpdateChat(RequestBody):
    metadata: Metadata | None


class ChatDeleted(Wire):
    object: Literal["chat.completion.deleted"]
    id: str
    deleted: Literal[True]


class StoredMessage(Wire):
    model_config = ConfigDict(extra="allow", strict=False)

    id: str
    role: str
    content: str | None
    content_parts: list[dict[str, Any]] | None


class ChatMessageList(ListPage):
    data: list[StoredMessage]
    first_id: str | None
    last_id: str | None
    has_more: bool


class CreateFeedback(RequestBody):
    completion_id: Annotated[str, no_nul]
    rating: Literal["good", "bad"] | None = None
    better_answer: Annotated[str, Field(min_length=1, max_length=1_000_000), no_nul] | None = None
    """What should have been answered; retraining learns it."""
    comment: Annotated[str, Field(max_length=10_000), no_nul] | None = None


class FeedbackObject(Wire):
    id: str
    object: Literal["feedback"]
    created_at: int
    completion_id: str
    rating: Literal["good", "bad"] | None
    better_answer: str | None
    comment: str | None


def stored_chat(row: ChatRow) -> StoredChat:
    asked = {name: row.request[name] for name in SHOWN if row.request.get(name) is not None}
    ours = {"metadata": row.meta, "rating": row.rating, "better_answer": row.better_answer, "version": row.version}
    return StoredChat.model_validate({**asked, **row.response, **ours})


def chat_messages(row: ChatRow) -> list[StoredMessage]:
    found = []
    for number, message in enumerate(row.request.get("messages", [])):
        content = message.get("content")
        parts = content if isinstance(content, list) else None
        values = {**message, "content": None if parts else content, "content_parts": parts, "id": f"{row.id}-{number}"}
        found.append(StoredMessage.model_validate(values))
    return found


def feedback_object(row: FeedbackRow) -> FeedbackObject:
    return FeedbackObject(
        id=row.id,
        object="feedback",
        created_at=row.created_at,
        completion_id=row.chat_id,
        rating=row.rating,  # type: ignore[arg-type]  # pydantic checks it
        better_answer=row.better_answer,
        comment=row.comment,
    )
