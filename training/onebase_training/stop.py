"""Signals become a request that the run answers at a safe place: Ctrl-C and SIGTERM save a checkpoint first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console


class ServerGone(Exception):
    """The server whose memory holds the base has ended: go on from the last checkpoint with another base."""


class StopRequest:
    """Before and after the training loop a signal ends the run at once; inside, after the step under way."""

    def __init__(self) -> None:
        self.asked = False
        self.reached_training = False
        """Whether the run folder's checkpoints are this run's own."""
        self._deferred = False
        self._seen: set[int] = set()

    @contextmanager
    def installed(self, console: Console) -> Iterator[None]:
        """Catch SIGINT and SIGTERM. A second one of the same kind interrupts at once: of another it may be the
        launcher's, which passes on a Ctrl-C that the terminal has sent to all."""

        def stop(number: int, _frame: FrameType | None) -> None:
            if number in self._seen or not self._deferred:
                raise KeyboardInterrupt
            self._seen.add(number)
            if not self.asked:
                self.asked = True
                console.print("[yellow]stopping after this step; a checkpoint will be saved (Ctrl-C again: at once)")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Inside, a signal waits for the end of the step."""
        self._deferred = self.reached_training = True
        try:
            yield
        finally:
            self._deferred = False
