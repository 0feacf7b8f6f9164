"""The engine's own settings. Sizes of the device (pages, slots, batch) are the runner's: see `RunnerLimits`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Times in seconds, memory in bytes."""

    max_queued: int = 1024
    """Sequences that may wait for their first step; past it `submit` raises Overloaded. A sixteenth more is kept for
    owners who have none in the queue, so that one who fills it shuts out only himself."""
    fairness_wait_s: float = 0.5
    """A request whose adapter finds no slot for this long makes another adapter drain."""
    drain_limit_s: float = 2.0
    """A drain that lasts longer preempts the sequences still running."""
    host_budget_bytes: int = 4 << 30
    """Host copies of adapters. Exceeded only by copies on their way to a slot, and by pins."""
    loader_threads: int = 2
    failed_load_ttl_s: float = 2.0
    """For so long a version that failed to load fails again without its files being read again."""
    prefix_cache: bool = True
    share_prefixes: bool = False
    """Whether one owner's request may use what another's has computed of the same prompt."""
    max_failed_steps: int = 8
    """So many steps failing in a row end the engine: the device is not coming back."""
    max_known_adapters: int = 4096
    """Versions whose counters are remembered while they are in no memory."""
