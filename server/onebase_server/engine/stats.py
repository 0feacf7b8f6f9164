"""Counters of the engine, and the snapshot that metrics and admin pages show."""

from dataclasses import dataclass, field

from onebase_server.engine.types import FinishReason


@dataclass(slots=True)
class Counters:
    """Totals since the start; written by the engine thread only."""

    num_steps: int = 0
    num_failed_steps: int = 0
    step_s: float = 0.0
    """Wall time in steps."""
    runner_s: float = 0.0
    """Of it, waiting for the runner."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))
    mean_request_s: float = 1.0
    """Submission to end, of late."""

    def note_duration(self, seconds: float) -> None:
        self.mean_request_s += 0.1 * (seconds - self.mean_request_s)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Read without a lock: each number is right, together they may be a step apart."""

    is_healthy: bool
    num_running: int
    num_waiting: int
    num_queued: int
    """Waiting sequences that never ran: what `max_queued` bounds."""
    pages_total: int
    pages_held: int
    pages_idle: int
    """Held by nobody, kept for the prefix cache."""
    pages_evicted: int
    num_preempted: int
    host_bytes: int
    num_steps: int
    num_failed_steps: int
    step_s: float
    runner_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: dict[FinishReason, int]
