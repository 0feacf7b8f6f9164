"""Counters of the engine, and the snapshot that metrics and admin pages show."""

from bisect import bisect_left
from dataclasses import dataclass, field

from onebase_server.engine.types import FinishReason

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


@dataclass(slots=True)
class Distribution:
    """Counts by upper bound, the last one without; one writer, read without a lock."""

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Distribution":
        return Distribution(self.bounds, list(self.counts), self.total)


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
    steps_s: Distribution = field(default_factory=Distribution)
    batch_sizes: Distribution = field(default_factory=lambda: Distribution(SIZES))
    """Sequences in a step."""
    waits_s: Distribution = field(default_factory=Distribution)
    """Submission to the first step."""
    load_s: float = 0.0
    num_loads: int = 0
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
    steps_s: Distribution
    batch_sizes: Distribution
    waits_s: Distribution
    load_s: float
    """Time in reading versions from disk."""
    num_loads: int
