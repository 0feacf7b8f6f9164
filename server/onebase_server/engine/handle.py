"""A request's own channel: the engine thread pushes, one reader (asyncio or a plain thread) takes.

Unread events of a choice are merged into one, so a slow reader costs the engine nothing and memory no more than
the text itself. The engine never waits for a reader.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

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
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


MAX_UNREAD = 32
"""Events of one choice that lie unread before they are merged."""

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class RequestHandle:
    """What `Engine.submit` returns. One reader at a time; leaving `events()` early cancels the request."""

    def __init__(self, request: GenerationRequest, cancel: Callable[["RequestHandle"], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._lock = threading.Lock()
        self._condition: threading.Condition | None = None
        """Made by the first plain thread that waits: most readers are asyncio's, and there are many of them."""
        self._unread: dict[int, list[TokenEvent]] = {}
        self._open = request.n
        """Choices whose last event has not been pushed."""
        self._waiter: Waiter | None = None
        self._blocked = False
        self.queue_s: float | None = None
        """Submission to the first step, once that has been; written by the engine thread."""

    @property
    def is_finished(self) -> bool:
        """Every choice has had its last event (read or not)."""
        return self._open == 0

    def cancel(self) -> None:
        """End all open choices with CANCELLED, within one step. From any thread, any number of times."""
        if self._open:
            self._cancel(self)

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Events as they come, until every choice has ended. Leaving early cancels."""
        loop = asyncio.get_running_loop()
        remaining = self.request.n
        try:
            while remaining:
                waiter: asyncio.Future[None] | None = None
                with self._lock:
                    unread, self._unread = self._unread, {}
                    if not unread:
                        waiter = loop.create_future()
                        self._waiter = (loop, waiter)
                if waiter is not None:
                    await waiter
                for events in unread.values():
                    event = merge(events)
                    remaining -= event.finish_reason is not None
                    yield event
        finally:
            self._waiter = None
            self.cancel()

    def iterate(self) -> Iterator[TokenEvent]:
        """As `events`, blocking the calling thread."""
        remaining = self.request.n
        condition = threading.Condition(self._lock)
        with condition:
            self._condition = condition
        try:
            while remaining:
                with condition:
                    while not self._unread:
                        self._blocked = True
                        condition.wait()
                    self._blocked = False
                    unread, self._unread = self._unread, {}
                for events in unread.values():
                    event = merge(events)
                    remaining -= event.finish_reason is not None
                    yield event
        finally:
            self.cancel()

    def take(self) -> list[TokenEvent]:
        """Unread events, at most one a choice; does not wait."""
        with self._lock:
            unread, self._unread = self._unread, {}
        return [merge(events) for events in unread.values()]

    async def complete(self) -> list[Completion]:
        """Every choice in whole, by index. Raises the error of a choice that failed."""
        return gather_choices([event async for event in self.events()], self.request.n)

    def complete_blocking(self) -> list[Completion]:
        """As `complete`, blocking the calling thread."""
        return gather_choices(self.iterate(), self.request.n)

    def push(self, event: TokenEvent) -> Waiter | None:
        """Engine side. Returns the reader to wake, if an asyncio one waits (see `wake`)."""
        with self._lock:
            events = self._unread.get(event.index)
            if events is None:
                self._unread[event.index] = [event]
            else:
                events.append(event)
                if len(events) == MAX_UNREAD:
                    events[:] = [merge(events)]
            if event.finish_reason is not None:
                self._open -= 1
            if self._blocked and self._condition is not None:
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


def merge(events: Sequence[TokenEvent]) -> TokenEvent:
    """Events of one choice as one."""
    if len(events) == 1:
        return events[0]
    last = events[-1]
    return TokenEvent(
        index=last.index,
        text="".join([event.text for event in events]),
        token_ids=tuple(chain.from_iterable([event.token_ids for event in events])),
        logprobs=tuple(chain.from_iterable([event.logprobs for event in events])),
        prompt_logprobs=tuple(chain.from_iterable([event.prompt_logprobs for event in events])),
        finish_reason=last.finish_reason,
        usage=last.usage,
        error=last.error,
    )


def gather_choices(events: Iterable[TokenEvent], n: int) -> list[Completion]:
    """All events of a request as whole choices. Raises the error of the first choice that failed."""
    choices: list[list[TokenEvent]] = [[] for _ in range(n)]
    for event in events:
        choices[event.index].append(event)
    completions = []
    for index, pieces in enumerate(choices):
        whole = merge(pieces)
        if whole.error is not None:
            raise whole.error.with_traceback(None)  # shared by all requests that it ended
        assert whole.finish_reason is not None
        assert whole.usage is not None
        completions.append(
            Completion(
                index,
                whole.text,
                whole.token_ids,
                whole.logprobs,
                whole.finish_reason,
                whole.usage,
                whole.prompt_logprobs,
            )
        )
    return completions
