"""What a run says to whoever watches it: one status file, replaced atomically, and one line of JSON an event.

The supervisor in the server reads these; it never talks to the training process in another way. No torch.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onebase.durable import replace_file
from onebase.errors import OnebaseError

logger = logging.getLogger(__name__)

State = Literal["validating", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Status:
    """The status file's content. `version` is the published `name@3`; `error` is {code, message, param}."""

    state: State
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    epoch: float = 0.0
    message: str = ""
    version: str | None = None
    error: dict[str, str | None] | None = None
    trained_tokens: int = 0
    checkpoint: str | None = None
    """Folder of the last whole checkpoint."""
    pid: int = 0
    updated_at: float = 0.0


class StatusWriter:
    """Writes `path` (None: nowhere) and appends events beside it, in `<path>.events.jsonl`.

    Every change of state is written; progress at most a few times a second. Threads may share it.
    """

    MIN_INTERVAL_S = 0.3
    ALIVE_S = 10.0
    """What is written anyway once this has passed, as a sign of life."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._written_at = 0.0
        self.status = Status("validating", pid=os.getpid())
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()

    @classmethod
    def taken_up(cls, path: Path | None) -> "StatusWriter":
        """Over a status file that another process of the run has ended: its state and version stay."""
        writer = cls(None)
        if path is not None:
            try:
                known = json.loads(path.read_text("utf-8"))
                writer.status = Status(**known)
            except (OSError, ValueError, TypeError):
                writer.status = replace(writer.status, state="running")
            writer._path = path
        return writer

    def progress(self, **changes: Any) -> None:
        with self._lock:
            self.status = replace(self.status, **changes)
            if time.monotonic() - self._written_at >= self.MIN_INTERVAL_S:
                self._write()

    def alive(self) -> None:
        """Nothing new, but work goes on: called from inside long work, as often as one likes."""
        if time.monotonic() - self._written_at >= self.ALIVE_S:
            self.progress()

    def enter(self, state: State, message: str = "", **changes: Any) -> None:
        """A new state: written at once, durably."""
        with self._lock:
            self.status = replace(self.status, state=state, message=message, **changes)
            self._write()

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Append one event: `metrics`, `eval`, `checkpoint`, `notice`."""
        if self._path is None:
            return
        line = json.dumps({"type": kind, "created_at": int(time.time()), **data}, ensure_ascii=False)
        with (
            _not_the_end_of_the_run(),
            self._path.with_name(self._path.name + ".events.jsonl").open("a", encoding="utf-8") as stream,
        ):
            stream.write(line + "\n")

    def _write(self) -> None:
        self._written_at = time.monotonic()
        self.status = replace(self.status, updated_at=time.time())
        if self._path is not None:
            with _not_the_end_of_the_run():
                replace_file(self._path, (json.dumps(asdict(self.status)) + "\n").encode())


@contextmanager
def _not_the_end_of_the_run() -> Iterator[None]:
    """A full disk: what can't be told is lost, not the hours before it. Checkpoints and versions do fail then."""
    try:
        yield
    except OSError as error:
        logger.warning("the run's status can't be written: %s", error)


def error_content(error: BaseException) -> dict[str, str | None]:
    """What ended a run, as `Status.error`."""
    if isinstance(error, OnebaseError):
        return {"code": error.code or "training_failed", "message": error.message, "param": error.param}
    return {"code": "internal_error", "message": f"{type(error).__name__}: {error}", "param": None}
