"""Making way for requests: between two layers a training process looks whether a server on its home works, and waits.

How long is the policy's: so many times as long as the layer before took, at most, that training keeps the policy's
share (`onebase.train_policy`) of its time, by how many requests there are. So it goes on at a known share of its speed
under any load, on any device, without a setting in seconds. No torch: the clock is the caller's.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from onebase.serving_note import Load, SeenServer, living_servers
from onebase.train_policy import policy_of

POLL_S: Final = 0.002
LOOK_S: Final = 1.0
"""Between looks for servers that have come or gone."""
RECENTLY_S: Final = 1.0
STUCK_S: Final = 5.0
"""A server that has requests and makes no step for so long is not waited for."""


class _Watched:
    """A server and when its steps were last seen to move."""

    def __init__(self, server: SeenServer, now: float) -> None:
        self.server = server
        self.is_here: bool | None = None
        """Whether it is on our device; None until it says so."""
        self._last = Load()
        self._moved_at = now

    def sequences(self, now: float) -> int:
        """That run or wait on it; none on a server that is stuck."""
        load = self.server.load()
        if load.steps != self._last.steps or not self._last.is_busy:
            self._moved_at = now
        self._last = load
        return load.running + load.waiting if now - self._moved_at < STUCK_S else 0


class Yielder:
    """`at_boundary()` between layers. `policy` as in `train_policy.policy_of`. `hurries`: no more waiting, as when the
    run is asked to stop; `on_wait` is called while it waits, as a sign of life."""

    def __init__(
        self,
        folder: Path,
        policy: str,
        device: str,
        *,
        hurries: Callable[[], bool] = lambda: False,
        on_wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder, self._device = folder, _with_index(device)
        self._policy = policy_of(policy)
        self._hurries, self._on_wait, self._clock, self._sleep = hurries, on_wait, clock, sleep
        self._watched: dict[Path, _Watched] = {}
        self._looked_at = float("-inf")
        self._left_at = clock()
        self.waited_s = 0.0
        self._held_back_at = float("-inf")

    @property
    def has_servers(self) -> bool:
        """Whether there is anybody to make way for, at work or not."""
        return bool(self._watched)

    @property
    def holds_back(self) -> bool:
        """Whether there is somebody to make way for, or was a moment ago: between two requests nothing is let loose."""
        return self._left_at - self._held_back_at < RECENTLY_S

    def at_boundary(self) -> None:
        """Returns when the next layer may run."""
        begin = now = self._clock()
        took = begin - self._left_at
        while (left := begin + self._patience(now) * took - now) > 0 and not self._hurries():
            self._held_back_at = now
            self._on_wait()
            self._sleep(min(POLL_S, left))
            now = self._clock()
        self.waited_s += now - begin
        self._left_at = now

    def _patience(self, now: float) -> float:
        """How many times as long as a layer took to wait for the requests there are now."""
        if self._policy.least == 1:
            return 0.0
        if now - self._looked_at >= LOOK_S:
            self._look(now)
        sequences = sum(watched.sequences(now) for watched in self._watched.values() if self._is_here(watched))
        return 1 / self._policy.share(sequences, self._device) - 1

    def _look(self, now: float) -> None:
        self._looked_at = now
        living = living_servers(self._folder, {path: known.server for path, known in self._watched.items()})
        self._watched = {path: self._watched.get(path) or _Watched(server, now) for path, server in living.items()}

    def _is_here(self, watched: _Watched) -> bool:
        """A server that does not say where it is counts as on our device."""
        if watched.is_here is None:
            described = watched.server.base() if watched.server.is_ready else None
            if described is None:
                return True
            watched.is_here = _with_index(str(described.get("device", self._device))) == self._device
        return watched.is_here


def _with_index(device: str) -> str:
    return "cuda:0" if device == "cuda" else device
