"""Server-sent events as OpenAI writes them: `data: <json>` and an empty line, `[DONE]` last, comments on silence.

sse-starlette does the streaming, the keep-alive and the watch for a client that leaves; this adds OpenAI's framing
and two promises: what runs behind the stream is cancelled however the stream ends, and an error after the first
byte is an event and a clean end.
"""

from collections.abc import AsyncIterator, Callable

from litestar.types import HTTPScope, Receive, Send, WebSocketScope
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent

from onebase_server.api.errors import answer_for
from onebase_server.api.request_id import request_id_of

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(model: BaseModel) -> bytes:
    """One event. Fields that were not set are left out; JSON has no line breaks, so one `data:` line holds it."""
    return b"data: " + model.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def named_event(name: str, model: BaseModel) -> bytes:
    """One event of the Responses API, which names its events."""
    return b"event: " + name.encode() + b"\n" + event(model)


class EventStream(EventSourceResponse):
    """A stream over `events`; `on_end` is called once the stream is over, or was never begun."""

    def __init__(
        self, events: AsyncIterator[bytes], on_end: Callable[[], None], *, ping_s: float, done: bytes = DONE
    ) -> None:
        self._events = events
        self._on_end = on_end
        self._done = done
        self._request_id = ""
        super().__init__(
            self._guarded(),
            headers=HEADERS,
            sep="\n",
            ping=ping_s,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
        )

    # The same ASGI values as Starlette's, in Litestar's types: it is Litestar that calls.
    async def __call__(  # type: ignore[override]
        self, scope: HTTPScope | WebSocketScope, receive: Receive, send: Send
    ) -> None:
        self._request_id = request_id_of(scope)
        try:
            await super().__call__(scope, receive, send)  # type: ignore[arg-type]
        finally:
            # NOTE: not in the generator's own `finally`: one that never started never runs it
            self._on_end()

    async def _guarded(self) -> AsyncIterator[bytes]:
        try:
            async for item in self._events:
                yield item
        except Exception as error:  # noqa: BLE001 - the status is sent: the error can only be an event now
            yield event(answer_for(error, request_id=self._request_id).body)
            return
        if self._done:
            yield self._done
