"""The engine as everyone else sees it: submit, cancel, adapters in and out, stop. Callable from any thread.

The work is done by `EngineCore` on a thread of its own; commands reach it through one queue, so their order against
requests is total. See docs/decisions/ on the engine thread.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from onebase.errors import EngineError, InvalidInput, NotReady
from onebase.serving_note import ServerNote
from onebase_server.engine import commands
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.core import EngineCore
from onebase_server.engine.detokenizer import TokenBytes, TokenTable
from onebase_server.engine.grammar import GrammarBackend
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.intake import check_request, make_group
from onebase_server.engine.queue_room import QueueRoom
from onebase_server.engine.residence import AdapterStatus, Place
from onebase_server.engine.runner import Runner, RunnerLimits
from onebase_server.engine.stats import EngineStats
from onebase_server.engine.types import AdapterRef, GenerationRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

HANDOVER_S = 0.00002
"""An engine that slept needs the interpreter to begin its first step, and whoever submits would keep it: what is left
of a request's handling (0.4 ms) is done while the step computes. Long enough for a thread to wake up."""


class Engine:
    """One runner, many requests. `note` is told the load and closed at the end. `executor` and `clock` are for tests
    that want no threads and no time."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenBytes,
        config: EngineConfig | None = None,
        *,
        grammar: GrammarBackend | None = None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
        note: ServerNote | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self._note = note
        self.limits: RunnerLimits = runner.limits
        if self.limits.max_batch_tokens < self.limits.max_batch_sequences:
            raise InvalidInput("max_batch_tokens must be at least max_batch_sequences", param="max_batch_tokens")
        self._table = TokenTable(tokenizer)
        self._has_grammar = grammar is not None
        self._clock = clock
        self._arrivals = itertools.count()
        self._inbox: queue.SimpleQueue[commands.Command] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Guards `_is_accepting`, `room` and, with them, what enters the inbox."""
        self._is_accepting = True
        self.room = QueueRoom(self.config.max_queued)
        self._error: BaseException | None = None
        self._is_shut = False
        self._own_executor = executor is None
        self._executor = executor or ThreadPoolExecutor(self.config.loader_threads, "onebase-loader")
        self.core = EngineCore(
            runner, self.config, self._inbox, self._executor, self._on_unqueued, grammar, clock, note
        )
        self._thread = threading.Thread(target=self._run, name="onebase-engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Queue a request. Raises at once ContextLengthExceeded or InvalidInput (the request), Overloaded (the queue),
        NotReady (stopping) or EngineError (dead)."""
        check_request(request, self.limits)
        if request.sampling.grammar is not None and not self._has_grammar:
            raise InvalidInput("this server has no backend for constrained decoding", param="response_format")
        handle = RequestHandle(request, self._cancel)
        group = make_group(
            request,
            handle,
            self.limits,
            self._table,
            self._clock(),
            next(self._arrivals),
            share_prefixes=self.config.share_prefixes,
        )
        with self._lock:
            self._check_accepting()
            self.room.check(request, self._estimate_retry_s)
            was_idle = not self.room.num_queued and not self.core.has_requests
            self.room.take(request)
            self._inbox.put(commands.Submit(group))
        if was_idle:
            time.sleep(HANDOVER_S)
        return handle

    def preload(self, ref: AdapterRef, *, pin: bool = False) -> "Future[None]":
        """Bring a version to memory ahead of its first request; `pin` keeps it there. Fails with AdapterInvalid."""
        done: Future[None] = Future()
        return self._order(commands.Preload(done, ref, pin), done)

    def unpin(self, ref: AdapterRef) -> "Future[None]":
        """Let a pinned version leave memory again when others need the room."""
        done: Future[None] = Future()
        return self._order(commands.Unpin(done, ref), done)

    def unload(self, ref: AdapterRef, *, forget: bool = False) -> "Future[None]":
        """Free a version's memory once its running and waiting requests have ended; done then.

        `forget`: its counters too, for it will not come back.
        """
        done: Future[None] = Future()
        return self._order(commands.Unload(done, ref, forget), done)

    def publish(self, ref: AdapterRef, replaces: AdapterRef | None = None) -> "Future[None]":
        """A new version is current: load it, let the one that it replaces drain. Done when the new one is in memory."""
        loaded = self.preload(ref)
        if replaces is not None and replaces.digest != ref.digest:
            self.unload(replaces)
        return loaded

    def adapters(self) -> "Future[list[AdapterStatus]]":
        """Every version known, and where it is."""
        done: Future[list[AdapterStatus]] = Future()
        return self._order(commands.ListAdapters(done), done)

    def place_of(self, digest: str) -> Place:
        """Where a version is. Does not wait for the engine thread, so it may just have moved."""
        return self.core.residency.place_of(digest)

    @property
    def is_healthy(self) -> bool:
        """False once the engine thread has died: the process should be restarted."""
        return self._error is None

    @property
    def error(self) -> BaseException | None:
        """What the engine thread died of."""
        return self._error

    def stats(self) -> EngineStats:
        """Does not wait for the engine thread."""
        scheduler, counters, pages = self.core.scheduler, self.core.counters, self.core.scheduler.pages
        return EngineStats(
            is_healthy=self.is_healthy,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_queued=self.room.num_queued,
            pages_total=pages.num_pages,
            pages_held=pages.num_held,
            pages_idle=pages.num_idle,
            pages_evicted=pages.num_evicted,
            num_preempted=scheduler.num_preempted,
            host_bytes=self.core.residency.hosts.bytes,
            num_steps=counters.num_steps,
            num_failed_steps=counters.num_failed_steps,
            step_s=counters.step_s,
            runner_s=counters.runner_s,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            finished=dict(counters.finished),
            steps_s=counters.steps_s.copy(),
            batch_sizes=counters.batch_sizes.copy(),
            waits_s=counters.waits_s.copy(),
            load_s=counters.load_s,
            num_loads=counters.num_loads,
        )

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let the others finish for `drain_s`, then end those. Blocks until all is over."""
        with self._lock:
            self._is_accepting = False
            if not self._is_shut:
                self._inbox.put(commands.Stop(self._clock() + drain_s))
        if self._thread.ident is None:
            self._shut(None)
        else:
            self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self.core.run()
        except BaseException as caught:
            error = caught
            logger.critical("the engine has died", exc_info=caught)
        finally:
            self._shut(error)

    def _shut(self, error: BaseException | None) -> None:
        with self._lock:
            # From here on nothing enters the inbox, so what `shut` finds there is all there is.
            self._is_accepting = False
            self._is_shut = True
            self._error = error
        self.core.shut(error)
        if self._note is not None:
            self._note.close()
        if self._own_executor and isinstance(self._executor, ThreadPoolExecutor):
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _order(self, command: commands.Order, done: "Future[T]") -> "Future[T]":
        with self._lock:
            self._check_accepting()
            self._inbox.put(command)
        return done

    def _check_accepting(self) -> None:
        if self._error is not None:
            raise EngineError(f"the engine has stopped: {self._error}")
        if not self._is_accepting:
            raise NotReady("The server is shutting down.", retry_after_s=5)

    def _cancel(self, handle: RequestHandle) -> None:
        self._inbox.put(commands.Cancel(handle))

    def _on_unqueued(self, request: GenerationRequest) -> None:
        with self._lock:
            self.room.give_back(request)

    def _estimate_retry_s(self) -> float:
        """Roughly when the queue will have moved on by one batch."""
        rounds = self.room.num_queued / self.limits.max_batch_sequences
        return min(60.0, max(1.0, rounds * self.core.counters.mean_request_s))
