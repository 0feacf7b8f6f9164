"""A chat's token events -> a Response's typed events: each item opened, told piece by piece, and closed."""

from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from onebase.tokenizer import TextTokenizer
from onebase_server.api.chat_plan import ChatPlan
from onebase_server.api.generation import raise_if_failed
from onebase_server.api.logprobs import WaitingLogprobs
from onebase_server.api.response_body import call_item, end_response, message_item, new_id, text_part
from onebase_server.api.schemas_chat import LogprobEntry, ToolCallBody
from onebase_server.api.schemas_common import ErrorBody
from onebase_server.api.schemas_response_reply import ResponseBody, ResponseEvent, ResponseFailure
from onebase_server.api.sse import named_event
from onebase_server.api.tool_calls import CallReader, Piece, call_body, new_call_id
from onebase_server.engine.types import FinishReason, TokenEvent, Usage

Finished = Callable[[ResponseBody, str, list[ToolCallBody]], None]


class ResponseStream:
    """The events of one streamed response. `finished` is called once with the whole."""

    def __init__(self, response: ResponseBody, plan: ChatPlan, tokenizer: TextTokenizer, finished: Finished) -> None:
        self._response = response
        self._plan = plan
        self._finished = finished
        self._number = 0
        renderer = plan.model.renderer
        self._reader = CallReader(renderer.call_layout if plan.finds_calls else None, renderer.parse_text)
        self._waiting = WaitingLogprobs(tokenizer)
        self._item_id = new_id("msg")
        self._is_open = False
        """The message has begun and has not ended."""
        self._text = ""
        self._logprobs: list[LogprobEntry] = []
        self._calls: list[ToolCallBody] = []
        self._output: list[Any] = []
        """Items that have ended."""

    async def events(self, tokens: AsyncIterator[TokenEvent]) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        async for token in tokens:
            raise_if_failed(token)
            if self._plan.wants_logprobs:
                self._waiting.add(token.logprobs)
            for each in self._tell(self._reader.feed(token.text)):
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

    def _tell(self, pieces: list[Piece]) -> list[bytes]:
        events = []
        for piece in pieces:
            if piece.call is None:
                events += self._show(piece)
            elif piece.name is not None:
                events += self._close_item("completed")
                events.append(self._open_call(piece.name))
            else:
                events.append(self._more_arguments(piece.text))
        return events

    def _show(self, piece: Piece) -> list[bytes]:
        events = [] if self._is_open else self._open_message()
        self._text += piece.text
        events.append(self._text_delta(piece.text, self._take_logprobs(piece.end)))
        return events

    def _text_delta(self, text: str, entries: list[LogprobEntry]) -> bytes:
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=entries)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _open_message(self) -> list[bytes]:
        self._is_open = True
        item = message_item(self._item_id, "", [], "in_progress")
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place(), part=text_part("", [])),
        ]

    def _open_call(self, name: str) -> bytes:
        call = call_body(new_call_id(), name, "")
        self._calls.append(call)
        self._item_id = new_id("fc")
        item = call_item(self._item_id, call, "in_progress")
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _more_arguments(self, text: str) -> bytes:
        self._calls[-1].function.arguments += text
        where = {"item_id": self._item_id, "output_index": len(self._output)}
        return self._event("response.function_call_arguments.delta", **where, delta=text)

    def _close_item(self, status: str) -> list[bytes]:
        """End what is open: the message, or the last call."""
        if self._is_open:
            return self._close_message(status)
        return self._close_call(status) if self._calls else []

    def _close_message(self, status: str) -> list[bytes]:
        self._is_open = False
        item = message_item(self._item_id, self._text, self._logprobs, status)
        self._output.append(item)
        return [
            self._event("response.output_text.done", **self._place(), text=self._text, logprobs=self._logprobs),
            self._event("response.content_part.done", **self._place(), part=item.content[0]),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _close_call(self, status: str) -> list[bytes]:
        call, index = self._calls[-1], len(self._output)
        item = call_item(self._item_id, call, status)
        self._output.append(item)
        done = {"arguments": call.function.arguments, "name": call.function.name}
        return [
            self._event("response.function_call_arguments.done", item_id=self._item_id, output_index=index, **done),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _end(self, reason: FinishReason, usage: Usage) -> list[bytes]:
        events = self._tell(self._reader.finish())
        is_cut = reason is FinishReason.LENGTH
        if self._calls:
            is_cut = self._reader.is_cut
        else:
            events += [] if self._is_open else self._open_message()
            left = self._take_logprobs(None)
            if left:  # of tokens without text: half a character at the end, a control token
                events.append(self._text_delta("", left))
        events += self._close_item("incomplete" if is_cut else "completed")
        end_response(self._response, self._output, reason, usage)
        self._finished(self._response, self._text, self._calls)
        events.append(self._event(f"response.{self._response.status}", response=self._response))
        return events

    def _take_logprobs(self, end: int | None) -> list[LogprobEntry]:
        entries = self._waiting.take(end)
        self._logprobs.extend(entries)
        return entries

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = ResponseEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return named_event(kind, event)
