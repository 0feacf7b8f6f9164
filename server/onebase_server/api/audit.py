"""The audit log: calls that need the admin scope or delete a model, and what became of them, in <home>/audit/.

One JSON line each, without bodies and keys. It is appended to only; a file a month, so that old ones can be moved
away. Whoever may not call can't fill the disk with it: past `MOST_REFUSED` a minute refusals are counted, and the
count written down.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from litestar import Request
from litestar.types import Message, Scope

from onebase_server.api.auth import ADMIN
from onebase_server.api.caller import STATE_KEY, Caller
from onebase_server.api.request_id import request_id_of

logger = logging.getLogger(__name__)


MOST_REFUSED = 60
WINDOW_S = 60.0
MOST_CHARS = 300
TARGET_KEY = "onebase_target"


def tell_target(request: Request[Any, Any, Any], target: str) -> None:
    """What the call is about, where its path does not say: an id that was made, versions that were chosen."""
    request.scope["state"][TARGET_KEY] = target


class AuditLog:
    """Appends to `<folder>/<year>-<month>.jsonl`. Any number of processes may. `note` lives on one event loop."""

    def __init__(
        self, folder: Path, now: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.now = now
        self._clock = clock
        self._window_began = float("-inf")
        self._refused = 0
        """Calls by those who may not, since then."""

    def write(self, record: Mapping[str, Any]) -> None:
        """A log that can't be written is an error in the server's own log, and never the caller's: an admin must be
        able to free a full disk."""
        now = self.now()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        line = json.dumps({"time": stamp, **record}, ensure_ascii=True, default=str) + "\n"
        path = self.folder / time.strftime("%Y-%m.jsonl", time.gmtime(now))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, line.encode())  # one write of one line: appends of other processes don't mix with it
            finally:
                os.close(fd)
        except OSError as error:
            logger.error("the audit log %s can't be written: %s; lost: %s", path, error.strerror, line.strip())

    async def note(self, message: Message, scope: Scope) -> None:
        """Litestar's before-send hook: refused calls are written down too."""
        if message["type"] != "http.response.start" or not is_audited(scope):
            return
        state = scope.get("state", {})
        caller = state.get(STATE_KEY)
        key = caller.id if isinstance(caller, Caller) else None
        self._turn_window()
        if message["status"] in (401, 403):
            self._refused += 1
            if self._refused > MOST_REFUSED:
                return
        client = scope.get("client")
        record = {
            "request_id": request_id_of(scope),
            "key": key,
            "client": client[0] if client else None,
            "method": scope.get("method"),
            "path": str(scope.get("path", ""))[:MOST_CHARS],
            "status": message["status"],
        }
        self.write({**record, "target": str(state[TARGET_KEY])[:MOST_CHARS]} if TARGET_KEY in state else record)

    def _turn_window(self) -> None:
        now = self._clock()
        if now - self._window_began < WINDOW_S:
            return
        if self._refused > MOST_REFUSED:
            self.write({"key": None, "action": "more calls refused", "count": self._refused - MOST_REFUSED})
        self._window_began, self._refused = now, 0


def is_audited(scope: Scope) -> bool:
    handler: Any = scope.get("route_handler")
    return handler is not None and (handler.opt.get("scope") == ADMIN or bool(handler.opt.get("audited")))
