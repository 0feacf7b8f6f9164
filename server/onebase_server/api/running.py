"""One generation of one caller: its limits before it starts, its measures while it runs, its log line at the end.

Every endpoint that generates submits here and nowhere else, so that no route escapes a limit or a count.
"""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from litestar import Request

from onebase.errors import ModelNotFound, OnebaseError, Overloaded
from onebase.store_hold import Hold
from onebase_server.api.at_once import check_at_once, check_parallel, prompt_tokens_of, sequences_of
from onebase_server.api.backend import Backend
from onebase_server.api.caller import Caller, caller_of
from onebase_server.api.deps import AppDeps
from onebase_server.api.request_id import client_request_id, request_id_of
from onebase_server.api.tracing import Trace
from onebase_server.engine.handle import Completion, RequestHandle, gather_choices
from onebase_server.engine.types import FinishReason, GenerationRequest, TokenEvent

logger = logging.getLogger("onebase_server.generations")


def submit(
    request: Request[Any, Any, Any], deps: AppDeps, backend: Backend, model: str, wanted: GenerationRequest
) -> "Generation":
    """As `submit_all`, for one prompt."""
    [generation] = submit_all(request, deps, backend, model, [wanted])
    return generation


def submit_all(
    request: Request[Any, Any, Any], deps: AppDeps, backend: Backend, model: str, wanted: Sequence[GenerationRequest]
) -> list["Generation"]:
    """Queue all prompts of one call for its caller, or none. `model`: as it was asked for.

    Raises RateLimited for the key's own limits, InvalidInput for more than it may ever have at a time, ModelNotFound
    for a version that was removed since it was looked up, and what `Engine.submit` does.
    """
    caller = caller_of(request)
    limit_s = deps.settings.max_request_s
    deadline = time.monotonic() + limit_s if limit_s else None
    wanted = [replace(each, owner=caller.owner, deadline=deadline or each.deadline) for each in wanted]
    started: list[Generation] = []
    try:
        names = Names(
            request_id_of(request.scope), client_request_id(request.headers), request.headers.get("traceparent")
        )
        check_at_once(wanted, backend.engine.room.max_at_once)
        check_parallel(caller, wanted)
        deps.limiter.begin(caller, sequences_of(wanted), prompt_tokens_of(wanted))
        try:
            for each in wanted:
                hold = hold_files(model, each)
                try:
                    handle = backend.engine.submit(each)
                except BaseException:
                    if hold is not None:
                        hold.close()
                    raise
                started.append(Generation(handle, caller, deps, names, hold))
        except BaseException:
            left = wanted[len(started) :]
            deps.limiter.end(caller, sequences_of(left), unused=prompt_tokens_of(left))
            for generation in started:
                generation.cancel()
            raise
    except OnebaseError as error:
        reason = "overloaded" if isinstance(error, Overloaded) else error.code or type(error).__name__
        deps.metrics.refused.labels(reason).inc()
        raise
    return started


def hold_files(model: str, wanted: GenerationRequest) -> Hold | None:
    """Whoever removes the version from here on, in whatever process, leaves its files until the generation ends."""
    if wanted.adapter is None:
        return None
    try:
        return Hold(wanted.adapter.path)
    except FileNotFoundError as error:
        raise ModelNotFound(model) from error


@dataclass(frozen=True, slots=True)
class Names:
    """What the request is called: by us, by its client, by the trace that it is part of."""

    request_id: str
    client_id: str | None
    traceparent: str | None


@dataclass(slots=True)
class Tally:
    """What has come out so far. Times are `time.perf_counter` seconds."""

    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last_of: dict[int, float] = field(default_factory=dict)
    """Choice -> when its last token came."""
    prompt: int = 0
    cached: int = 0
    generated_of: dict[int, int] = field(default_factory=dict)
    """Choice -> tokens; an eos that is not shown is among them once the choice has ended."""
    ends: list[FinishReason] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return sum(self.generated_of.values())

    @property
    def outcome(self) -> FinishReason:
        """One word for all choices: the worst that happened to one."""
        worst = (FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.LENGTH)
        return next((reason for reason in worst if reason in self.ends), FinishReason.STOP)


class Generation:
    """A `Handle` that measures the engine's. However it is left, it closes once."""

    def __init__(
        self, handle: RequestHandle, caller: Caller, deps: AppDeps, names: Names, hold: Hold | None = None
    ) -> None:
        self._handle = handle
        self._hold = hold
        self._caller = caller
        self._deps = deps
        self._names = names
        self._tally = Tally(prompt=len(handle.request.prompt_ids))
        self._is_closed = False
        self._started_at = time.time()
        self._per_token_s = deps.metrics.per_token_s.labels(*deps.metrics.labels(handle.request.adapter))

    async def events(self) -> AsyncIterator[TokenEvent]:
        try:
            async for event in self._handle.events():
                self._note(event)
                yield event
        finally:
            self._close()

    async def complete(self) -> list[Completion]:
        """All choices in whole, by index. Raises the error of one that failed."""
        return gather_choices([event async for event in self.events()], self._handle.request.n)

    def cancel(self) -> None:
        """Frees everything within a step. May be called at any time, any number of times."""
        self._handle.cancel()
        self._close()

    def _note(self, event: TokenEvent) -> None:
        tally, count = self._tally, len(event.token_ids)
        if count:
            now = time.perf_counter()
            if tally.first is None:
                tally.first = now
            before = tally.last_of.get(event.index)
            if before is not None:
                self._per_token_s.observe((now - before) / count)
            tally.last_of[event.index] = now
            tally.generated_of[event.index] = tally.generated_of.get(event.index, 0) + count
        if event.finish_reason is not None:
            tally.ends.append(event.finish_reason)
            if event.usage is not None:
                tally.generated_of[event.index] = event.usage.completion_tokens
                tally.cached += event.usage.cached_tokens if event.index == 0 else 0

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._hold is not None:
            self._hold.close()
        tally, request = self._tally, self._handle.request
        if len(tally.ends) < request.n:
            tally.ends.append(FinishReason.CANCELLED)
        took = time.perf_counter() - tally.started
        never_ran = self._handle.queue_s is None
        self._deps.limiter.end(
            self._caller, request.n, generated=tally.generated, unused=tally.prompt if never_ran else 0
        )
        self._measure(took)
        self._log(took)
        if self._deps.tracer is not None:
            first_s = None if tally.first is None else tally.first - tally.started
            self._deps.tracer.record(
                Trace(
                    request_id=self._names.request_id,
                    key=self._caller.id,
                    model="base" if request.adapter is None else request.adapter.id,
                    outcome=tally.outcome.value,
                    started_at=self._started_at,
                    queue_s=self._handle.queue_s,
                    first_token_s=first_s,
                    total_s=took,
                    prompt_tokens=tally.prompt,
                    generated_tokens=tally.generated,
                    parent=self._names.traceparent,
                )
            )

    def _measure(self, took: float) -> None:
        metrics, tally = self._deps.metrics, self._tally
        labels = metrics.labels(self._handle.request.adapter)
        metrics.requests.labels(*labels, tally.outcome.value).inc()
        metrics.prompt_tokens.labels(*labels).inc(tally.prompt)
        metrics.cached_tokens.labels(*labels).inc(tally.cached)
        metrics.generated_tokens.labels(*labels).inc(tally.generated)
        metrics.request_s.labels(*labels).observe(took)
        if self._handle.queue_s is not None:
            metrics.queue_s.labels(*labels).observe(self._handle.queue_s)
        if tally.first is not None:
            metrics.first_token_s.labels(*labels).observe(tally.first - tally.started)

    def _log(self, took: float) -> None:
        """Who, on what, how much and how it ended: no text of either side."""
        tally, request = self._tally, self._handle.request
        model = "base" if request.adapter is None else request.adapter.id
        logger.info(
            "%s on %s: %s, %d+%d tokens in %.3f s", self._names.request_id, model, tally.outcome.value, tally.prompt,
            tally.generated, took,
            extra={
                "request_id": self._names.request_id,
                "client_request_id": self._names.client_id,
                "generation_id": request.id,
                "key": self._caller.id,
                "adapter": model,
                "outcome": tally.outcome.value,
                "prompt_tokens": tally.prompt,
                "cached_tokens": tally.cached,
                "generated_tokens": tally.generated,
                "queue_s": self._handle.queue_s,
                "first_token_s": None if tally.first is None else round(tally.first - tally.started, 6),
                "total_s": round(took, 6),
            },
        )  # fmt: skip
