"""Server-sent events as OpenAI writes them: `data: <json>` and an empty line, `[DONE]` last, comments on silence.

sse-starlette writes the stream; this adds OpenAI's framing and three promises: what runs behind the stream is
cancelled however the stream ends, an error after the first byte is an event and a clean end, and one that waits costs
little: one task and one timer beside the request's own, where sse-starlette starts four tasks in a group.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from litestar.types import HTTPScope, Receive, Send, WebSocketScope
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

from onebase_server.api.errors import answer_for
from onebase_server.api.request_id import request_id_of
from onebase_server.api.schemas_common import ErrorBody
from onebase_server.api.waiting import disconnected

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(model: BaseModel) -> bytes:
    """One event. Fields that were not set are left out; JSON has no line breaks, so one `data:` line holds it."""
    return b"data: " + model.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def named_event(name: str, model: BaseModel) -> bytes:
    """One event of the Responses API, which names its events."""
    return b"event: " + name.encode() + b"\n" + event(model)


class EventStream(EventSourceResponse):
    """A stream over `events`; `on_end` is called once the stream is over, or was never begun. `as_event` writes an
    error, after which nothing comes."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_end: Callable[[], None],
        *,
        ping_s: float,
        done: bytes = DONE,
        as_event: Callable[[ErrorBody], bytes] = event,
    ) -> None:
        self._events = events
        self._on_end = on_end
        self._done = done
        self._as_event = as_event
        self._request_id = ""
        super().__init__(self._guarded(), headers=HEADERS, sep="\n", ping=ping_s)
        self._send_lock = asyncio.Lock()  # type: ignore[assignment]  # a sixth of the size of anyio's
        self._is_over = False
        self._has_left = False
        self._timer: asyncio.TimerHandle | None = None
        self._pinging: asyncio.Task[None] | None = None

    # The same ASGI values as Starlette's, in Litestar's types: it is Litestar that calls.
    async def __call__(  # type: ignore[override]
        self, scope: HTTPScope | WebSocketScope, receive: Receive, send: Send
    ) -> None:
        """Stream in the request's own task; a client that hangs up ends it, like any other end."""
        self._request_id = request_id_of(scope)
        streaming = asyncio.current_task()
        assert streaming is not None
        watcher = asyncio.create_task(disconnected(receive))

        def leave(_: object) -> None:
            if not self._is_over:
                self._has_left = True
                streaming.cancel()

        watcher.add_done_callback(leave)
        try:
            self._ping_later(send)
            await self._stream_response(send)  # type: ignore[arg-type]
        except asyncio.CancelledError:
            # the watcher's own cancellation ends here, anybody else's goes on
            if not self._has_left or streaming.uncancel():
                raise
        finally:
            self._is_over = True
            for pending in (watcher, self._timer, self._pinging):
                if pending is not None:
                    pending.cancel()
            # NOTE: not in the generator's own `finally`: one that never started never runs it
            self._on_end()

    def _ping_later(self, send: Send) -> None:
        if self.ping_interval > 0 and not self._is_over:
            self._timer = asyncio.get_running_loop().call_later(self.ping_interval, self._begin_ping, send)

    def _begin_ping(self, send: Send) -> None:
        self._pinging = asyncio.create_task(self._ping(send))

    async def _ping(self, send: Send) -> None:  # type: ignore[override]
        async with self._send_lock:
            if self.active:
                await send({"type": "http.response.body", "body": PING, "more_body": True})
        self._pinging = None
        self._ping_later(send)

    async def _send_with_timeout(self, send: Any, message: Any) -> None:
        """Sends have no timeout here, as a slow reader costs nothing; a scope for one is a sixth of a chunk's cost."""
        await send(message)

    async def _guarded(self) -> AsyncIterator[bytes]:
        try:
            async for item in self._events:
                yield item
        except Exception as error:  # noqa: BLE001 - the status is sent: the error can only be an event now
            yield self._as_event(answer_for(error, request_id=self._request_id).body)
            return
        if self._done:
            yield self._done
