"""`POST /v1/chat/completions`: decode -> generate -> encode."""

from typing import Any

from litestar import Request, post
from litestar.params import JSONBody
from litestar.types import ASGIApp

from onebase_server.api.caller import caller_of
from onebase_server.api.chat_plan import check_chat, plan_chat_aside
from onebase_server.api.chat_reply import ChatStream, chat_completion
from onebase_server.api.chat_store import ChatKeeper
from onebase_server.api.deps import Deps
from onebase_server.api.generation import complete
from onebase_server.api.replies import json_reply
from onebase_server.api.running import submit
from onebase_server.api.schemas_chat import ChatRequest
from onebase_server.api.sse import EventStream
from onebase_server.api.visible import visible_model
from onebase_server.api.waiting import unless_client_leaves


@post("/chat/completions", operation_id="createChatCompletion", status_code=200, tags=["Chat"])
async def create_chat_completion(data: JSONBody[ChatRequest], deps: Deps, request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer a conversation with the base or an adapter, whole or streamed."""
    given = check_chat(data, deps.settings.max_choices)
    backend = deps.backend.get()
    caller = caller_of(request)
    plan = await plan_chat_aside(data, given, await visible_model(data.model, caller, backend, deps), backend)
    keeper = ChatKeeper(deps.chats, caller.owner, data, plan) if data.store else None
    handle = submit(request, deps, backend, plan.model.id, plan.request)
    if data.stream:
        stream = ChatStream(plan, backend.tokenizer, backend.fingerprint)
        events = stream.events(handle.events())
        kept = keeper.watch(events) if keeper else events
        return EventStream(kept, handle.cancel, ping_s=deps.settings.ping_s)
    choices = await unless_client_leaves(request.receive, complete(handle), handle.cancel)
    reply = chat_completion(plan, choices, backend.tokenizer, backend.fingerprint)
    if keeper is not None:
        await keeper.keep(reply)
    return json_reply(reply)
