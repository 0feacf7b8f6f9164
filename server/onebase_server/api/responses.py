"""`/v1/responses`: OpenAI's newer form of chat, over the same path; kept for a time to go on from."""

from typing import Annotated, Any, Literal

from litestar import Request, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.types import ASGIApp

from onebase.errors import InvalidInput
from onebase_server.api.caller import Caller, caller_of
from onebase_server.api.chat_plan import ChatPlan, check_chat, plan_chat_aside
from onebase_server.api.deps import AppDeps, Deps
from onebase_server.api.generation import complete
from onebase_server.api.replies import json_reply
from onebase_server.api.response_body import begin_response, new_id, whole_response
from onebase_server.api.response_plan import in_callers_words, output_messages, to_chat, to_chat_messages
from onebase_server.api.response_store import ResponseStore
from onebase_server.api.response_stream import Finished, ResponseStream
from onebase_server.api.running import submit
from onebase_server.api.schemas_chat import ChatMessage, ToolCallBody
from onebase_server.api.schemas_response_reply import (
    InputItemList,
    ResponseBody,
    ResponseDeleted,
    StoredInputItem,
)
from onebase_server.api.schemas_responses import ResponseRequest
from onebase_server.api.sse import EventStream
from onebase_server.api.visible import visible_model
from onebase_server.api.waiting import unless_client_leaves
from onebase_server.records.pages import page_of

Kept = NamedDependency[ResponseStore]
AnyRequest = Request[Any, Any, Any]


@post("/responses", operation_id="createResponse", status_code=200, tags=["Responses"])
async def create_response(data: JSONBody[ResponseRequest], deps: Deps, kept: Kept, request: AnyRequest) -> ASGIApp:
    """Answer an input, or go on from an earlier response; whole or as typed events."""
    caller = caller_of(request)
    history = kept.history(data.previous_response_id, caller.sees)
    plan = await plan_response(data, history, caller, deps)
    backend = deps.backend.get()
    response = begin_response(data, plan)
    finished = keeper(kept, caller.owner, data, history)
    handle = submit(request, deps, backend, plan.model.id, plan.request)
    if data.stream:
        stream = ResponseStream(response, plan, backend.tokenizer, finished)
        events = stream.events(handle.events())
        return EventStream(events, handle.cancel, ping_s=deps.settings.ping_s, done=b"", as_event=stream.failed)
    [choice] = await unless_client_leaves(request.receive, complete(handle), handle.cancel)
    finished(response, *whole_response(response, plan, choice, backend.tokenizer))
    return json_reply(response)


@get("/responses/{response_id:str}", operation_id="getResponse", tags=["Responses"])
async def get_response(
    response_id: FromPath[str], deps: Deps, kept: Kept, request: AnyRequest, stream: FromQuery[bool] = False
) -> ResponseBody:
    """A response that is still kept."""
    if stream:
        raise InvalidInput(
            "Invalid value for 'stream': this server streams a response only while it is made.",
            param="stream",
            code="unsupported_parameter",
        )
    return kept.get(response_id, caller_of(request).sees).response


@delete("/responses/{response_id:str}", operation_id="deleteResponse", status_code=200, tags=["Responses"])
async def delete_response(response_id: FromPath[str], deps: Deps, kept: Kept, request: AnyRequest) -> ResponseDeleted:
    """Forget a response now."""
    kept.delete(response_id, caller_of(request).sees)
    return ResponseDeleted(id=response_id, object="response", deleted=True)


@get("/responses/{response_id:str}/input_items", operation_id="listInputItems", tags=["Responses"])
async def list_input_items(
    response_id: FromPath[str],
    deps: Deps,
    kept: Kept,
    request: AnyRequest,
    after: FromQuery[str | None] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=100)] = 20,
    order: FromQuery[Literal["asc", "desc"]] = "desc",
) -> InputItemList:
    """What the request of a response put in, newest first unless asked otherwise."""
    items = kept.get(response_id, caller_of(request).sees).items
    if order == "desc":
        items = items[::-1]
    page = page_of(items, [item.id for item in items], after, limit)
    return InputItemList(
        object="list",
        data=list(page.rows),
        first_id=page.rows[0].id if page.rows else None,
        last_id=page.rows[-1].id if page.rows else None,
        has_more=page.has_more,
    )


async def plan_response(data: ResponseRequest, history: list[ChatMessage], caller: Caller, deps: AppDeps) -> ChatPlan:
    with in_callers_words():
        chat = to_chat(data, history)
        given = check_chat(chat, deps.settings.max_choices)
        backend = deps.backend.get()
        return await plan_chat_aside(chat, given, await visible_model(chat.model, caller, backend, deps), backend)


def keeper(kept: ResponseStore, owner: str, data: ResponseRequest, history: list[ChatMessage]) -> Finished:
    """Keeps a finished response, unless its client wants it forgotten."""

    def keep(response: ResponseBody, text: str, calls: list[ToolCallBody]) -> None:
        if data.store is False:
            return
        said = to_chat_messages(data)
        conversation = [*history, *said, *output_messages(text, calls)]
        kept.keep(owner, response, conversation, [item for message in said for item in items_of(message)])

    return keep


def items_of(message: ChatMessage) -> list[StoredInputItem]:
    if message.role == "tool":
        output = message.content if isinstance(message.content, str) else ""
        return [
            StoredInputItem(id=new_id("fco"), type="function_call_output", call_id=message.tool_call_id, output=output)
        ]
    items = []
    if message.content is not None:
        part: dict[str, Any] = {"type": "input_text", "text": message.content}
        if message.role == "assistant":
            part = {"type": "output_text", "text": message.content, "annotations": []}
        content = [part]
        items.append(StoredInputItem(id=new_id("msg"), type="message", role=message.role, content=content))
    for call in message.tool_calls or []:
        function = call.function
        items.append(
            StoredInputItem(
                id=new_id("fc"), type="function_call", call_id=call.id, name=function.name, arguments=function.arguments
            )
        )
    return items
