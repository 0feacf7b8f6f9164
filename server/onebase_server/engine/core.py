"""What the engine thread does: obey commands, run steps, end requests. One thread, so no locks.

`step` is the whole of it: schedule, launch, emit, collect, advance. Knows no torch, no HTTP and no threads.
"""

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

from onebase.errors import EngineError, NotReady
from onebase.serving_note import ServerNote
from onebase_server.engine import commands
from onebase_server.engine.batch import StepPlan, pack
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.constrained import ConstrainedDecoding
from onebase_server.engine.grammar import GrammarBackend
from onebase_server.engine.requests import OpenRequests
from onebase_server.engine.residence import Residence
from onebase_server.engine.residency import Residency
from onebase_server.engine.runner import DeviceLost, HostAdapter, OverlappingRunner, Runner, StepResult
from onebase_server.engine.scheduler import Scheduler
from onebase_server.engine.sequence import RequestGroup, Sequence, SequenceStatus
from onebase_server.engine.stats import Counters
from onebase_server.engine.types import FinishReason, GenerationRequest

logger = logging.getLogger(__name__)

POLL_S = 0.0001
"""Between looks while an adapter is being copied to the device and nothing else can run."""
WAIT_S = 0.01
"""Between looks while requests wait for a load or a slot and nothing else can run."""


class EngineCore:
    """`inbox` is the one way in from other threads. `on_unqueued`: a request has left the queue for good."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        inbox: "queue.SimpleQueue[commands.Command]",
        executor: Executor,
        on_unqueued: Callable[[GenerationRequest], None],
        grammar: GrammarBackend | None,
        clock: Callable[[], float],
        note: ServerNote | None = None,
    ) -> None:
        self._runner = runner
        self._note = note
        self._overlapping = runner if isinstance(runner, OverlappingRunner) else None
        self._config = config
        self._inbox = inbox
        self._clock = clock
        self.residency = Residency(runner, config, executor, self._post_loaded, clock)
        self.counters = Counters()
        self.requests = OpenRequests(self.counters, self._give_back, on_unqueued, clock)
        self.scheduler = Scheduler(runner, self.residency, config, self.requests.admitted)
        self._unemitted: tuple[StepPlan, StepResult] | None = None
        self.constrained = ConstrainedDecoding(grammar, executor, inbox, runner.limits.vocab_size)
        self._stop_at: float | None = None
        self._failures_in_row = 0

    # The loop

    def run(self) -> None:
        """Until told to stop. Raises what makes it impossible to go on."""
        while self.serve(self.idle_s()):
            self._tell_load()
            self.step()
            self._tell_load()

    @property
    def has_requests(self) -> bool:
        """Whether one has come that has not ended."""
        return bool(self.requests.groups)

    def _tell_load(self) -> None:
        """To training processes, which make way while there is something to do."""
        if self._note is not None:
            scheduler = self.scheduler
            self._note.tell(len(scheduler.running), len(scheduler.waiting), self.counters.num_steps)

    def serve(self, wait_s: float | None = 0.0) -> bool:
        """Obey the waiting commands; for a first one wait at most `wait_s` (None: for ever). False: time to end."""
        inbox = self._inbox
        if wait_s is None or wait_s > 0:
            with suppress(queue.Empty):
                self._obey(inbox.get(timeout=wait_s))
        while not inbox.empty():
            self._obey(inbox.get())
        now = self._clock()
        self.requests.expire(now)
        return self._stop_at is None or (self.has_requests and now < self._stop_at)

    def idle_s(self) -> float | None:
        """How long to wait for a command before the next step; None: until one comes."""
        is_over = self._stop_at is not None and not self.has_requests
        if self.scheduler.running or self._unemitted is not None or is_over:
            return 0.0
        if self.residency.slots.is_copying:
            return POLL_S
        if len(self.scheduler.waiting):
            return WAIT_S
        times = [time for time in (self._stop_at, self.requests.next_deadline) if time is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def step(self) -> bool:
        """One pass over the batch. False if nothing could run."""
        begin = time.perf_counter()
        self._follow_adapters()
        plan = self.scheduler.schedule(self._clock())
        if plan is None:
            self._emit()
            return False
        try:
            result, runner_s = self._launch_and_collect(plan)
            self.scheduler.advance(plan, result)
        except Exception as error:  # noqa: BLE001 - the runner's; it ends requests or the engine
            self._fail_step(plan, error)
            return True
        self._failures_in_row = 0
        self._unemitted = (plan, result)
        self.constrained.advance(plan.sampling, self.requests.fail)
        if self._overlapping is None or not self.scheduler.running:
            self._emit()
        counters = self.counters
        counters.num_steps += 1
        counters.generated_tokens += len(plan.sampling)
        counters.runner_s += runner_s
        took = time.perf_counter() - begin
        counters.step_s += took
        counters.steps_s.add(took)
        counters.batch_sizes.add(len(plan.sequences))
        return True

    def _launch_and_collect(self, plan: StepPlan) -> tuple[StepResult, float]:
        """Run the step, and how long that took; while an overlapping runner works, emit the step before and fill this
        one's masks."""
        batch = pack(plan, self.scheduler.tables)
        ticket = None if self._overlapping is None else self._overlapping.launch(batch)
        with self.requests.step_in_flight():
            if self._overlapping is not None:
                self._emit()
            self.constrained.fill_masks(self.requests.fail)
            begin = time.perf_counter()
            result = self._runner.run(batch) if self._overlapping is None else self._overlapping.collect(ticket)
        return result, time.perf_counter() - begin

    def _emit(self) -> None:
        if self._unemitted is not None:
            plan, result = self._unemitted
            self._unemitted = None
            self.requests.emitter.emit(plan, result)

    def _follow_adapters(self) -> None:
        """Note finished copies, and fail the requests of versions that can't be loaded."""
        if self.residency.poll():
            self.scheduler.admission.is_stale = True
        for entry, error in self.residency.take_failed():
            for sequence in [s for s in self.scheduler.waiting if s.residence is entry]:
                self.requests.end_group(sequence.group, FinishReason.ERROR, error)

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        """The runner failed: all in this batch end with an error; the rest goes on unless the device is lost."""
        self.counters.num_failed_steps += 1
        self._failures_in_row += 1
        logger.error("step %d failed: %s", self.counters.num_steps, error, exc_info=error)
        if isinstance(error, DeviceLost) or self._failures_in_row >= self._config.max_failed_steps:
            raise error
        self._emit()
        cause = EngineError(f"the engine failed while it computed this request: {error}")
        cause.__cause__ = error
        for sequence in dict.fromkeys((*plan.sequences, *plan.sampling)):
            for member in (sequence, *sequence.group.followers):
                self.requests.fail(member, cause)

    # Commands

    def _obey(self, command: commands.Command) -> None:
        match command:
            case commands.Submit():
                self._accept(command.group)
            case commands.Cancel():
                group = self.requests.groups.get(command.handle)
                if group is not None:
                    self.requests.end_group(group, FinishReason.CANCELLED)
            case commands.AdapterLoaded():
                self.counters.num_loads += 1
                self.counters.load_s += command.seconds
                self.residency.on_loaded(command.residence, command.host, command.error, command.seconds)
                self.scheduler.admission.is_stale = True
            case commands.GrammarCompiled(group, None, error):
                self.requests.end_group(group, FinishReason.ERROR, error)
            case commands.GrammarCompiled():
                self.constrained.start(command, self.requests.fail)
                self.scheduler.admission.is_stale = True
            case commands.Stop():
                self._stop_at = command.deadline
            case _ if command.done.set_running_or_notify_cancel():
                self._order(command)

    def _order(self, command: commands.Order) -> None:
        match command:
            case commands.Preload():
                self.residency.preload(command.ref, command.done, pin=command.pin)
            case commands.Unload():
                self.residency.unload(command.ref, command.done, forget=command.forget)
            case commands.Unpin():
                self.residency.unpin(command.ref, command.done)
            case commands.ListAdapters():
                command.done.set_result(self.residency.status())

    def _accept(self, group: RequestGroup) -> None:
        request = group.request
        self.requests.add(group)
        if request.adapter is not None:
            group.residence = self.residency.lease(request.adapter, request.n)
        self.constrained.compile(group)
        self.scheduler.add(group.sequences[0], self._clock())

    def _post_loaded(self, entry: Residence, host: HostAdapter | None, error: Exception | None, seconds: float) -> None:
        self._inbox.put(commands.AdapterLoaded(entry, host, error, seconds))

    # Ends

    def shut(self, error: BaseException | None) -> None:
        """The end, good or bad: every request gets its last event, everybody who waits for an order is told."""
        cause = _last_words(error)
        try:
            self._emit()
        except Exception:
            logger.exception("could not emit the last step")
        while not self._inbox.empty():
            command = self._inbox.get()
            match command:
                case commands.Submit():
                    self.requests.add(command.group)
                case commands.Preload() | commands.Unload() | commands.Unpin() | commands.ListAdapters():
                    if command.done.set_running_or_notify_cancel():
                        command.done.set_exception(cause)
        self.requests.fail_all(cause)
        self.residency.abort(cause)

    def _give_back(self, sequence: Sequence) -> None:
        """The one place where a sequence's pages, state, place and lease come back."""
        if sequence.status is not SequenceStatus.FINISHED:
            self.scheduler.remove(sequence)
        self.constrained.forget(sequence)
        if sequence.group.residence is not None:
            self.residency.release(sequence.group.residence)


def _last_words(error: BaseException | None) -> Exception:
    if error is None:
        return NotReady("The server is shutting down.", retry_after_s=5)
    cause = EngineError(f"the engine has stopped: {error}")
    cause.__cause__ = error
    return cause
