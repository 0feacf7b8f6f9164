"""Asks the key table again ahead of need, so that a request after a quiet moment does not wait for the answer.

An answer counts for half a second only, and to ask takes 2 ms of the first token's time. So for the few keys used last
it is asked again while it still counts, for minutes after their last use. What a key may do is not known here, and how
long a revoked one still works is not changed: answers are replaced earlier, never kept longer.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from onebase.errors import NotReady

EVERY_S = 0.3
"""Well within the time that an answer counts for."""
FOR_S = 300.0
"""After the last use: longer than people think between two turns of a chat."""
MAX_KEPT = 4
"""Many keys in turn keep each other from being asked often: those pay for their own question, as all did before."""


class FreshKeys:
    """`ask(name)` brings one answer up to date. Lives on one event loop; nothing runs while nothing is used."""

    def __init__(self, ask: Callable[[str], Awaitable[object]], *, every_s: float = EVERY_S) -> None:
        self._ask = ask
        self._every_s = every_s
        self._used: OrderedDict[str, float] = OrderedDict()
        """Name -> the loop's time of its last use, the longest ago first."""
        self._task: asyncio.Task[None] | None = None
        self._is_open = False

    def open(self) -> None:
        """From here on, until `close`; before, nothing runs on its own."""
        self._is_open = True

    def note(self, name: str) -> None:
        """It was used just now."""
        if not self._is_open:
            return
        loop = asyncio.get_running_loop()
        self._used[name] = loop.time()
        self._used.move_to_end(name)
        if len(self._used) > MAX_KEPT:
            self._used.popitem(last=False)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._go_on())

    async def close(self) -> None:
        """Ask no more, from here on."""
        self._is_open = False
        self._used.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _go_on(self) -> None:
        loop = asyncio.get_running_loop()
        while self._used:
            await asyncio.sleep(self._every_s)
            for name, at in list(self._used.items()):
                if loop.time() - at > FOR_S:
                    self._used.pop(name, None)
                    continue
                try:
                    await self._ask(name)
                except NotReady:
                    continue  # the next request asks for itself, and says so to its caller
