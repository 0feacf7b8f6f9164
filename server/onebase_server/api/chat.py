"""`POST /v1/chat/completions`: decode -> generate -> encode."""

from typing import Any

from litestar import Request, post
from litestar.params import JSONBody
from litestar.types import ASGIApp

from onebase_server.api.chat_plan import check_chat, plan_chat
from onebase_server.api.chat_reply import ChatStream, chat_completion
from onebase_server.api.deps import Deps
from onebase_server.api.generation import complete
from onebase_server.api.models_lookup import look_up
from onebase_server.api.replies import json_reply
from onebase_server.api.schemas_chat import ChatRequest
from onebase_server.api.sse import EventStream
from onebase_server.api.waiting import unless_client_leaves


@post("/chat/completions", operation_id="createChatCompletion", status_code=200, tags=["Chat"])
async def create_chat_completion(data: JSONBody[ChatRequest], deps: Deps, request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer a conversation with the base or an adapter, whole or streamed."""
    given = check_chat(data, deps.settings.max_choices)
    backend = deps.backend.get()
    plan = plan_chat(data, given, look_up(data.model, backend, deps.store), backend)
    handle = backend.engine.submit(plan.request)
    if data.stream:
        stream = ChatStream(plan, backend.tokenizer, backend.fingerprint)
        return EventStream(stream.events(handle.events()), handle.cancel, ping_s=deps.settings.ping_s)
    choices = await unless_client_leaves(request.receive, complete(handle), handle.cancel)
    return json_reply(chat_completion(plan, choices, backend.tokenizer, backend.fingerprint))
