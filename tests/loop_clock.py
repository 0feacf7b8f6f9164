"""The clock of an event loop in another thread, moved by the test: nobody waits for a limit, or meets one by chance."""

import asyncio
import threading
import time


class LoopClock:
    """Its time goes on as ever, and further at each leap."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ahead = 0.0
        loop.time = lambda: time.monotonic() + self._ahead  # type: ignore[method-assign]

    def leap(self, seconds: float) -> None:
        """Returns when the loop has read what had been sent to it before, and done what was due after."""
        done = threading.Event()

        def go_round(left: int) -> None:
            if left == 2:
                self._ahead += seconds
            if left == 0:
                done.set()
            else:
                self._loop.call_soon(go_round, left - 1)

        self._loop.call_soon_threadsafe(go_round, 5)
        done.wait()
