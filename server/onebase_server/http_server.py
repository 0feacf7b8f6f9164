"""uvicorn with a graceful end: on SIGTERM or SIGINT it stops being ready, lets running requests finish, then leaves.

uvicorn alone closes its port at once and hands the signal on afterwards (so its exit code is the signal's); load
balancers need the 503 of /readyz first, and a clean end is exit code 0.
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn
from litestar import Litestar

from onebase_server.settings import Settings
from onebase_server.slow_clients import BoundedBodies, protocol_within

logger = logging.getLogger(__name__)

ONE_SIGNAL_S = 0.5
END_LIMIT_S = 10.0
"""For the step that runs and for streams to be told; then the process leaves all the same."""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """What happens around the HTTP server. `bound` and `drain` are called on its event loop and must not block."""

    bound: Callable[[str], None]
    """The port is open: gets the server's URL."""
    drain: Callable[[], None]
    """Take no new work."""
    is_dead: Callable[[], bool]
    """What serves has failed for good: the process ends, so that whoever watches it starts a new one."""
    end: Callable[[], None]
    """No request is left, or their time is up: end what still runs. Called on a thread of its own."""


class HttpServer(uvicorn.Server):
    def __init__(self, app: Litestar, settings: Settings, lifecycle: Lifecycle) -> None:
        config = uvicorn.Config(
            BoundedBodies(app, settings.slow_client_s),
            http=protocol_within(settings.slow_client_s, settings.max_connections),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_s = settings.drain_s
        self._drain_until: float | None = None
        self._signalled_at = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._lifecycle.bound(self._url())

    def begin_exit(self) -> None:
        """What the first signal does; does nothing if there was one. From any thread."""
        if self._drain_until is None and not self.should_exit:
            self.handle_exit(signal.SIGTERM, None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends at once. Two in a row are one: `timeout` sends it twice."""
        now = time.monotonic()
        if self._drain_until is not None:
            if now - self._signalled_at > ONE_SIGNAL_S:
                self.force_exit = self.should_exit = True
            return
        self._signalled_at = now
        logger.info("signal %d: finishing running requests, for %.0f s at most", sig, self._drain_s)
        self._drain_until = now + self._drain_s
        self._lifecycle.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called every 0.1 s; True ends the main loop."""
        if self._drain_until is not None:
            idle = not self.server_state.tasks
            self.should_exit = self.should_exit or idle or time.monotonic() >= self._drain_until
        elif self._lifecycle.is_dead():
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A device that hangs must not keep the process: a daemon thread, waited for only so long.
        ending = threading.Thread(target=self._lifecycle.end, name="onebase-end", daemon=True)
        ending.start()
        give_up_at = time.monotonic() + END_LIMIT_S
        while ending.is_alive() and time.monotonic() < give_up_at:
            await asyncio.sleep(0.005)
        await super().shutdown(sockets)

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
