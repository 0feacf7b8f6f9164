"""A fake model that says "x" for ever, one token whenever the test lets a step through, and how to wait for it."""

import threading
import time
from collections.abc import Callable

from fakes import FakeRunner
from onebase_server.engine.runner import StepBatch, StepResult


class SteppingRunner(FakeRunner):
    """Says "x" for ever, one token whenever the test lets a step through."""

    def __init__(self) -> None:
        super().__init__(reply=lambda digest, prompt: [ord("x")] * 400)
        self.steps = threading.Semaphore(0)
        self.free = threading.Event()

    def run(self, batch: StepBatch) -> StepResult:
        if not self.free.is_set():
            self.steps.acquire()
        return super().run(batch)

    def let_go(self) -> None:
        self.free.set()
        self.steps.release(10)


def wait_until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.002)
