"""`GET /v1/chat/completions` and below: the chats that were kept by `store: true`, as OpenAI lists them."""

from functools import partial
from typing import Annotated, Any, Literal

from litestar import Request, delete, get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from onebase.errors import NotFound
from onebase_server.api.caller import caller_of
from onebase_server.api.deps import AppDeps, Deps
from onebase_server.api.query import metadata_filter
from onebase_server.api.schemas_stored import (
    ChatDeleted,
    ChatMessageList,
    StoredChat,
    StoredChatList,
    UpdateChat,
    chat_messages,
    stored_chat,
)
from onebase_server.records.pages import page_of
from onebase_server.records.tables import ChatRow

AnyRequest = Request[Any, Any, Any]
Limit = Annotated[int, QueryParameter(ge=1, le=1000)]
Order = Literal["asc", "desc"]


@get("/chat/completions", operation_id="listChatCompletions", tags=["Stored chats"])
async def list_chats(
    request: AnyRequest,
    deps: Deps,
    model: FromQuery[str | None] = None,
    after: FromQuery[str | None] = None,
    limit: Limit = 20,
    order: FromQuery[Order] = "asc",
) -> StoredChatList:
    """The caller's stored chats, oldest first; `metadata[key]=value` filters them."""
    read = partial(
        deps.chats.list,
        caller_of(request).sees,
        model=model,
        metadata=metadata_filter(request.query_params),
        limit=limit,
        order=order,
    )
    page = await read(after=after)
    while page.has_more and all(is_damaged(row) for row in page.rows):
        page = await read(after=page.rows[-1].id)  # OpenAI's clients take an empty page for the end
    data = [stored_chat(row) for row in page.rows if not is_damaged(row)]
    return StoredChatList(
        object="list",
        data=data,
        first_id=data[0].id if data else None,
        last_id=page.rows[-1].id if page.rows else None,
        has_more=page.has_more,
    )


@get("/chat/completions/{chat_id:str}", operation_id="getChatCompletion", tags=["Stored chats"])
async def retrieve_chat(chat_id: FromPath[str], request: AnyRequest, deps: Deps) -> StoredChat:
    """One stored chat."""
    return stored_chat(await find_chat(chat_id, request, deps))


@post("/chat/completions/{chat_id:str}", operation_id="updateChatCompletion", status_code=200, tags=["Stored chats"])
async def update_chat(
    chat_id: FromPath[str], data: JSONBody[UpdateChat], request: AnyRequest, deps: Deps
) -> StoredChat:
    """Replace a stored chat's metadata."""
    sees = caller_of(request).sees
    row = await deps.chats.set_metadata(chat_id, sees, data.metadata)
    return stored_chat(readable(row or missing(chat_id)))


@delete("/chat/completions/{chat_id:str}", operation_id="deleteChatCompletion", status_code=200, tags=["Stored chats"])
async def delete_chat(chat_id: FromPath[str], request: AnyRequest, deps: Deps) -> ChatDeleted:
    """Forget a stored chat and what was thought of it."""
    if not await deps.chats.delete(chat_id, caller_of(request).sees):
        missing(chat_id)
    return ChatDeleted(object="chat.completion.deleted", id=chat_id, deleted=True)


@get("/chat/completions/{chat_id:str}/messages", operation_id="getChatCompletionMessages", tags=["Stored chats"])
async def list_chat_messages(
    chat_id: FromPath[str],
    request: AnyRequest,
    deps: Deps,
    after: FromQuery[str | None] = None,
    limit: Limit = 20,
    order: FromQuery[Order] = "asc",
) -> ChatMessageList:
    """What a stored chat was asked."""
    messages = chat_messages(await find_chat(chat_id, request, deps))
    if order == "desc":
        messages.reverse()
    page = page_of(messages, [message.id for message in messages], after, limit)
    return ChatMessageList(
        object="list",
        data=list(page.rows),
        first_id=page.rows[0].id if page.rows else None,
        last_id=page.rows[-1].id if page.rows else None,
        has_more=page.has_more,
    )


async def find_chat(chat_id: str, request: AnyRequest, deps: AppDeps) -> ChatRow:
    return readable(await deps.chats.get(chat_id, caller_of(request).sees) or missing(chat_id))


def is_damaged(row: ChatRow) -> bool:
    """What can't be read of a row reads as empty (records/stored_json.py), and neither side of a chat ever is."""
    return not (row.request and row.response)


def readable(row: ChatRow) -> ChatRow:
    if is_damaged(row):
        raise NotFound(
            f"The stored chat completion '{row.id}' is damaged: it can only be deleted.", param="completion_id"
        )
    return row


def missing(chat_id: str) -> ChatRow:
    raise NotFound(f"No stored chat completion '{chat_id}': it was not made with store: true.", param="completion_id")
