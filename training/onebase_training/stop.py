"""Signals become a request that the run answers at a safe place. Ctrl-C saves a checkpoint first; SIGTERM does not."""

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
        self.save = False
        self._deferred = False

    @contextmanager
    def installed(self, console: Console) -> Iterator[None]:
        """Catch SIGINT and SIGTERM. A second Ctrl-C interrupts at once."""

        def interrupt(_signal: int, _frame: FrameType | None) -> None:
            if self.asked or not self._deferred:
                raise KeyboardInterrupt
            self.asked = self.save = True
            console.print("[yellow]stopping after this step; a checkpoint will be saved (Ctrl-C again: at once)")

        def terminate(_signal: int, _frame: FrameType | None) -> None:
            if not self._deferred:
                raise KeyboardInterrupt
            self.asked = True

        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
            signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Inside, a signal waits for the end of the step."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
