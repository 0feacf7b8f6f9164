"""Clients that send or read slowly on purpose, or for ever: bounds on headers, bodies and answers that nobody takes.

Headers must come within the limit. Between two requests a connection is kept for longer than clients keep theirs: one
that both end at the same moment (5 s in uvicorn and in httpx, so in OpenAI's client) fails the request that the client
had just sent on it. A body may take as long as it likes at `MIN_RATE` bytes a second or more.

A client that reads slowly is no trouble to the engine: its events merge in its own channel (engine/handle.py). One that
takes nothing at all for the limit, with more waiting than buffers hold, is cut: else it would keep a connection, its
answer and its key's place among the generations at a time for as long as it likes.
"""

import asyncio
import logging
from typing import Any

import h11
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, HTTPReceiveMessage, Receive, Scope, Send, WebSocketReceiveMessage
from uvicorn.protocols.http.h11_impl import H11Protocol

from onebase_server.api.waiting import ClientLeft
from onebase_server.early_replies import NO_HTTP, early_reply, too_many_connections

logger = logging.getLogger(__name__)

MIN_RATE = 1000.0
TIMED_OUT = 408


def protocol_within(limit_s: float, most: int) -> type[H11Protocol]:
    """uvicorn's protocol for one server: a request's head must be whole `limit_s` after its first byte (after the
    connection, for the first), and of `most` connections those that wait for no answer make way for new ones."""
    idle: dict[H11Protocol, None] = {}

    class BoundedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        _reader_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._served = self.app
            self._watch()
            if len(self.connections) > most and idle:
                next(iter(idle)).shutdown()  # idle for longest

        def data_received(self, data: bytes) -> None:
            idle.pop(self, None)
            crowded = len(self.connections) > most or len(self.tasks) >= most  # it is among the connections itself
            self.app = too_many_connections if crowded else self._served
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                idle[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            idle.pop(self, None)
            self._stop_watching()
            self._stop_watching_reader()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """The buffers are full: the answer waits for its reader."""
            super().pause_writing()
            self._watch_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_watching_reader()

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():  # `close` would wait for whoever takes nothing
                self.transport.abort()
            super().timeout_keep_alive_handler()

        def shutdown(self) -> None:
            idle.pop(self, None)
            super().shutdown()

        def send_400_response(self, msg: str) -> None:
            headers, body = early_reply(NO_HTTP.format(why=msg), "invalid_request_error")
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _watch(self) -> None:
            """One timer from when a head is due until it is whole: bytes in between don't wind it up again."""
            awaits_head = self.cycle is None or self.cycle.response_complete
            if not awaits_head:
                self._stop_watching()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(limit_s, self._give_up)

        def _stop_watching(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _give_up(self) -> None:
            self._head_timer = None
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            self.transport.close()

        def _watch_reader(self) -> None:
            unsent = self.transport.get_write_buffer_size()
            self._reader_timer = self.loop.call_later(limit_s, self._check_reader, unsent)

        def _stop_watching_reader(self) -> None:
            if self._reader_timer is not None:
                self._reader_timer.cancel()
                self._reader_timer = None

        def _check_reader(self, unsent: int) -> None:
            """While it is paused nothing is added, so less is left if anything was taken."""
            if self.transport.get_write_buffer_size() < unsent:
                self._watch_reader()
                return
            self._reader_timer = None
            logger.info("a client took nothing of its answer for %.0f s: its connection is cut", limit_s)
            self.transport.abort()

    return BoundedProtocol


class BoundedBodies:
    """ASGI: a body that comes too slowly is answered with 408."""

    def __init__(self, app: ASGIApp, limit_s: float) -> None:
        self._app = app
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if str(scope["type"]) == "http":
            receive = Patience(receive, self._limit_s)
        await self._app(scope, receive, send)


class Patience:
    """`receive` that runs out of patience before the body is whole, and waits for ever afterwards."""

    def __init__(self, receive: Receive, limit_s: float) -> None:
        self._receive = receive
        self._clock = asyncio.get_running_loop().time
        self._until = self._clock() + limit_s
        self._is_whole = False

    async def __call__(self) -> HTTPReceiveMessage | WebSocketReceiveMessage:
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - self._clock()):
                message: Any = await self._receive()
        except TimeoutError as error:
            raise HTTPException(status_code=TIMED_OUT) from error
        if message["type"] == "http.disconnect":
            raise ClientLeft  # Litestar would call it a failure of ours
        self._until += len(message.get("body", b"")) / MIN_RATE
        self._is_whole = not message.get("more_body")
        return message  # type: ignore[no-any-return]
