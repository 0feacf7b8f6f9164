"""A request's own channel: the engine thread pushes, one reader (asyncio or a plain thread) takes.

Unread events of a choice are merged into one, so a slow reader costs the engine nothing and memory no more than
the text itself. The engine never waits for a reader.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from onebase_server.engine.types import FinishReason, GenerationRequest, TokenEvent, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice in whole."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage


Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class RequestHandle:
    """What `Engine.submit` returns. One reader at a time; leaving `events()` early cancels the request."""

    def __init__(self, request: GenerationRequest, cancel: Callable[["RequestHandle"], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._condition = threading.Condition(threading.Lock())
        self._unread: dict[int, TokenEvent] = {}
        self._open = request.n
        """Choices whose last event has not been pushed."""
        self._waiter: Waiter | None = None
        self._blocked = False

    @property
    def is_finished(self) -> bool:
        """Every choice has had its last event (read or not)."""
        return self._open == 0

    def cancel(self) -> None:
        """End all open choices with CANCELLED, within one step. From any thread, any number of times."""
        if self._open:
            self._cancel(self)

    async def events(self) -> AsyncIterator[TokenEvent]:
        """Events as they come, until every choice has ended. Leaving early cancels."""
        loop = asyncio.get_running_loop()
        remaining = self.request.n
        try:
            while remaining:
                waiter: asyncio.Future[None] | None = None
                with self._condition:
                    unread, self._unread = self._unread, {}
                    if not unread:
                        waiter = loop.create_future()
                        self._waiter = (loop, waiter)
                if waiter is not None:
                    await waiter
                for event in unread.values():
                    remaining -= event.finish_reason is not None
                    yield event
        finally:
            self._waiter = None
            self.cancel()

    def iterate(self) -> Iterator[TokenEvent]:
        """As `events`, blocking the calling thread."""
        remaining = self.request.n
        try:
            while remaining:
                with self._condition:
                    while not self._unread:
                        self._blocked = True
                        self._condition.wait()
                    self._blocked = False
                    unread, self._unread = self._unread, {}
                for event in unread.values():
                    remaining -= event.finish_reason is not None
                    yield event
        finally:
            self.cancel()

    def take(self) -> list[TokenEvent]:
        """Unread events, at most one a choice; does not wait."""
        with self._condition:
            unread, self._unread = self._unread, {}
        return list(unread.values())

    async def complete(self) -> list[Completion]:
        """Every choice in whole, by index. Raises the error of a choice that failed."""
        return gather_choices([event async for event in self.events()], self.request.n)

    def complete_blocking(self) -> list[Completion]:
        """As `complete`, blocking the calling thread."""
        return gather_choices(self.iterate(), self.request.n)

    def push(self, event: TokenEvent) -> Waiter | None:
        """Engine side. Returns the reader to wake, if an asyncio one waits (see `wake`)."""
        with self._condition:
            earlier = self._unread.get(event.index)
            self._unread[event.index] = event if earlier is None else merge(earlier, event)
            if event.finish_reason is not None:
                self._open -= 1
            if self._blocked:
                self._condition.notify()
            waiter, self._waiter = self._waiter, None
            return waiter


def wake(waiters: Iterable[Waiter]) -> None:
    """Wake asyncio readers: one call into each event loop, however many of its readers wait."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, future in waiters:
        by_loop.setdefault(loop, []).append(future)
    for loop, futures in by_loop.items():
        # A closed loop has no readers left to wake.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list["asyncio.Future[None]"]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def merge(earlier: TokenEvent, later: TokenEvent) -> TokenEvent:
    """Two events of one choice as one."""
    return TokenEvent(
        index=earlier.index,
        text=earlier.text + later.text,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        finish_reason=later.finish_reason,
        usage=later.usage,
        error=later.error,
    )


def gather_choices(events: Iterable[TokenEvent], n: int) -> list[Completion]:
    """All events of a request as whole choices. Raises the error of the first choice that failed."""
    merged: dict[int, TokenEvent] = {}
    for event in events:
        earlier = merged.get(event.index)
        merged[event.index] = event if earlier is None else merge(earlier, event)
    for event in merged.values():
        if event.error is not None:
            raise event.error
    completions = []
    for index in range(n):
        event = merged[index]
        assert event.finish_reason is not None
        assert event.usage is not None
        completions.append(
            Completion(index, event.text, event.token_ids, event.logprobs, event.finish_reason, event.usage)
        )
    return completions
