"""The audit log: calls that need the admin scope or delete a model, and what became of them, in <home>/audit/.

One JSON line each, without bodies and keys. It is appended to only; a file a month, so that old ones can be moved
away.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litestar.types import Message, Scope

from onebase_server.api.auth import ADMIN
from onebase_server.api.caller import STATE_KEY, Caller
from onebase_server.api.request_id import request_id_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends to `<folder>/<year>-<month>.jsonl`. Any number of processes may."""

    folder: Path
    now: Callable[[], float] = time.time

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
        caller = scope.get("state", {}).get(STATE_KEY)
        client = scope.get("client")
        self.write(
            {
                "request_id": request_id_of(scope),
                "key": caller.id if isinstance(caller, Caller) else None,
                "client": client[0] if client else None,
                "method": scope.get("method"),
                "path": str(scope.get("path", ""))[:300],
                "status": message["status"],
            }
        )


def is_audited(scope: Scope) -> bool:
    handler: Any = scope.get("route_handler")
    return handler is not None and (handler.opt.get("scope") == ADMIN or bool(handler.opt.get("audited")))
