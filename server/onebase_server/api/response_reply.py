"""A chat's result -> OpenAI's Response, whole or as its typed events."""

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from onebase.messages import ToolCall
from onebase.tokenizer import TextTokenizer
from onebase_server.api.chat_plan import ChatPlan
from onebase_server.api.generation import raise_if_failed
from onebase_server.api.logprobs import chat_logprobs
from onebase_server.api.schemas_chat import ChatLogprobs, LogprobEntry, ToolCallBody
from onebase_server.api.schemas_common import ErrorBody
from onebase_server.api.schemas_responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseBody,
    ResponseEvent,
    ResponseFailure,
    ResponseRequest,
    ResponseUsage,
    TextFormat,
    TextSettings,
)
from onebase_server.api.sse import named_event
from onebase_server.api.tool_calls import CallWatch, with_ids
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import FinishReason, TokenEvent, TokenLogprob, Usage

Finished = Callable[[ResponseBody, str, list[ToolCallBody]], None]


def begin_response(body: ResponseRequest, plan: ChatPlan) -> ResponseBody:
    """The response before its first token: what was asked, in full."""
    return ResponseBody(
        id=f"resp_{secrets.token_hex(16)}",
        object="response",
        created_at=plan.created,
        status="in_progress",
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=plan.model.id,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": None, "summary": None},
        store=body.store is not False,
        temperature=plan.request.sampling.temperature,
        text=TextSettings(format=(body.text.format if body.text else None) or TextFormat(type="text")),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_p=plan.request.sampling.top_p,
        top_logprobs=plan.request.sampling.top_logprobs or 0,
        truncation="disabled",
        background=False,
        usage=None,
        user=body.user,
        metadata=body.metadata or {},
    )


def end_response(response: ResponseBody, output: Sequence[Any], reason: FinishReason, usage: Usage) -> None:
    """Fill in what came."""
    cut = reason is FinishReason.LENGTH
    response.output = list(output)
    response.status = "incomplete" if cut else "completed"
    response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if cut else None
    response.usage = ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def whole_response(
    response: ResponseBody, plan: ChatPlan, choice: Completion, tokenizer: TextTokenizer
) -> tuple[str, list[ToolCallBody]]:
    """Complete `response`; gives its text and calls."""
    text = choice.text
    calls: tuple[ToolCall, ...] = ()
    if plan.finds_calls:
        parsed = plan.model.renderer.parse_text(choice.text)
        text, calls = parsed.content, parsed.tool_calls[: 1 if plan.one_call else None]
    named = with_ids(calls)
    status = "incomplete" if choice.finish_reason is FinishReason.LENGTH else "completed"
    output: list[Any] = []
    if text or not named:
        entries = chat_logprobs(choice.logprobs, tokenizer).content or [] if plan.wants_logprobs else []
        output.append(message_item(new_id("msg"), text, entries, status))
    output += [call_item(new_id("fc"), call, "completed") for call in named]
    end_response(response, output, choice.finish_reason, choice.usage)
    return text, named


def message_item(item_id: str, text: str, logprobs: list[LogprobEntry], status: Any) -> OutputMessage:
    content = [] if status == "in_progress" else [text_part(text, logprobs)]
    return OutputMessage(id=item_id, type="message", role="assistant", status=status, content=content)


def text_part(text: str, logprobs: list[LogprobEntry]) -> OutputText:
    return OutputText(type="output_text", text=text, annotations=[], logprobs=logprobs)


def call_item(item_id: str, call: ToolCallBody, status: Any) -> OutputCall:
    arguments = "" if status == "in_progress" else call.function.arguments
    return OutputCall(
        id=item_id, type="function_call", status=status, call_id=call.id, name=call.function.name, arguments=arguments
    )


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


class ResponseStream:
    """The events of one streamed response. `finished` is called once with the whole."""

    def __init__(self, response: ResponseBody, plan: ChatPlan, tokenizer: TextTokenizer, finished: Finished) -> None:
        self._response = response
        self._plan = plan
        self._tokenizer = tokenizer
        self._finished = finished
        self._number = 0
        layout = plan.model.renderer.call_layout if plan.finds_calls else None
        self._watch = CallWatch(layout.before.rstrip() if layout else "", plan.model.renderer.parse_text)
        self._item_id = new_id("msg")
        self._is_open = False
        self._text = ""
        self._pending: list[TokenLogprob] = []
        self._logprobs: list[LogprobEntry] = []
        self._output: list[Any] = []

    async def events(self, tokens: AsyncIterator[TokenEvent]) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        async for token in tokens:
            raise_if_failed(token)
            self._pending.extend(token.logprobs)
            for each in self._show(self._watch.feed(token.text) if self._plan.finds_calls else token.text):
                yield each
            if token.finish_reason is not None:
                for each in self._end(token.finish_reason, token.usage or Usage(0, 0)):
                    yield each

    def failed(self, error: ErrorBody) -> bytes:
        """The stream's end for an error after its first byte: what went wrong, then the response as it was left."""
        told = error.error
        limited = told.code == "rate_limit_exceeded"
        code: Literal["server_error", "rate_limit_exceeded"] = "rate_limit_exceeded" if limited else "server_error"
        self._response.status = "failed"
        self._response.error = ResponseFailure(code=code, message=told.message)
        return self._event("error", code=told.code or code, message=told.message, param=told.param) + self._event(
            "response.failed", response=self._response
        )

    def _show(self, text: str) -> list[bytes]:
        if not text:
            return []
        events = [] if self._is_open else self._open_message()
        self._text += text
        entries = self._take_logprobs()
        where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        events.append(self._event("response.output_text.delta", **where, delta=text, logprobs=entries))
        return events

    def _open_message(self) -> list[bytes]:
        self._is_open = True
        item = message_item(self._item_id, "", [], "in_progress")
        where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **where, part=text_part("", [])),
        ]

    def _end(self, reason: FinishReason, usage: Usage) -> list[bytes]:
        rest, calls = self._watch.finish() if self._plan.finds_calls else ("", ())
        named = with_ids(calls[: 1 if self._plan.one_call else None])
        events = self._show(rest)
        status = "incomplete" if reason is FinishReason.LENGTH else "completed"
        if self._is_open or not named:
            events += self._close_message(status)
        for call in named:
            events += self._call(call)
        end_response(self._response, self._output, reason, usage)
        self._finished(self._response, self._text, named)
        events.append(self._event(f"response.{self._response.status}", response=self._response))
        return events

    def _close_message(self, status: str) -> list[bytes]:
        events = [] if self._is_open else self._open_message()
        item = message_item(self._item_id, self._text, self._logprobs, status)
        self._output.append(item)
        where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return [
            *events,
            self._event("response.output_text.done", **where, text=self._text, logprobs=self._logprobs),
            self._event("response.content_part.done", **where, part=item.content[0]),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _call(self, call: ToolCallBody) -> list[bytes]:
        index, item_id = len(self._output), new_id("fc")
        item = call_item(item_id, call, "completed")
        self._output.append(item)
        where = {"item_id": item_id, "output_index": index}
        arguments = call.function.arguments
        done = {"arguments": arguments, "name": call.function.name}
        return [
            self._event("response.output_item.added", output_index=index, item=call_item(item_id, call, "in_progress")),
            self._event("response.function_call_arguments.delta", **where, delta=arguments),
            self._event("response.function_call_arguments.done", **where, **done),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _take_logprobs(self) -> list[LogprobEntry]:
        if not self._plan.wants_logprobs:
            return []
        shown: ChatLogprobs = chat_logprobs(self._pending, self._tokenizer)
        self._pending = []
        entries = shown.content or []
        self._logprobs.extend(entries)
        return entries

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = ResponseEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return named_event(kind, event)
