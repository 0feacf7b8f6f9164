"""A running job's news: the trainer's status and events files become columns and events.

Everything here may be done again after a crash: events are known by their step, and the events file is read from its
beginning by whoever takes a run up. Knows nothing of processes and of the job's end.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onebase_server.jobs.checkpoints import Checkpoints
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.run_folder import RunFolder, TrainerStatus
from onebase_server.jobs.states import CANCELLED, PAUSED, PUBLISHING, QUEUED, RUNNING
from onebase_server.records.jobs import NewCheckpoint, NewEvent
from onebase_server.records.tables import JobRow

MEASURED = (
    "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy", "full_valid_loss",
    "full_valid_mean_token_accuracy", "learning_rate", "grad_norm",
)  # fmt: skip
# How an event's message says them.
SPOKEN = {
    "train_loss": "training loss",
    "valid_loss": "validation loss",
    "full_valid_loss": "full validation loss",
}


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What was measured at a step, by OpenAI's names."""

    step: int
    total_steps: int
    values: Mapping[str, float]

    @property
    def event(self) -> NewEvent:
        kind = "step" if "train_loss" in self.values else "eval"
        shown = [f"{words}={self.values[name]:.2f}" for name, words in SPOKEN.items() if name in self.values]
        text = f"Step {self.step}/{self.total_steps}: {', '.join(shown)}"
        data = {"step": self.step, "total_steps": self.total_steps, **self.values}
        return NewEvent(f"{kind}:{self.step}", text, type="metrics", data=data)


@dataclass(frozen=True, slots=True)
class Notice:
    """What the trainer found worth saying, such as rows that it left out."""

    message: str

    @property
    def event(self) -> NewEvent:
        key = hashlib.sha256(self.message.encode()).hexdigest()[:32]
        return NewEvent(f"notice:{key}", self.message, level="warn")


class EventsTail:
    """Reads the trainer's events as they come; a line that is still being written is left for the next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[StepMetrics | Notice]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        if not newline:
            return []
        self._offset += len(whole) + 1
        return [found for line in whole.split(b"\n") if (found := parse_event(line)) is not None]


def parse_event(line: bytes) -> StepMetrics | Notice | None:
    """None for what is not told on. Another process wrote it, and a crash may have left half a line in the middle."""
    try:
        raw = json.loads(line)
    except ValueError:
        return None
    if not isinstance(raw, dict):
        return None
    if raw.get("type") == "notice" and isinstance(raw.get("message"), str):
        return Notice(raw["message"])
    if raw.get("type") not in ("metrics", "eval") or not isinstance(raw.get("step"), int):
        return None
    values = {name: float(raw[name]) for name in MEASURED if isinstance(raw.get(name), int | float)}
    finite = {name: value for name, value in values.items() if abs(value) < float("inf")}
    return StepMetrics(raw["step"], int(raw.get("total_steps") or 0), finite) if finite else None


class Reporter:
    """Tells of one run. `tick` is called while its process lives, and once more when it has ended."""

    def __init__(self, job: JobRow, folder: RunFolder, ledger: Ledger, checkpoints: Checkpoints | None) -> None:
        self._job_id = job.id
        self._folder = folder
        self._ledger = ledger
        self._checkpoints = checkpoints
        self._tail = EventsTail(folder.events)
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._events: list[NewEvent] = []
        """Not kept yet, as `_points`: a tick that fails loses none of them."""
        self._points: list[NewCheckpoint] = []
        self._told: TrainerStatus | None = None

    async def tick(self) -> None:
        """Write down what is new. May raise what a disk or a database does, and be called again then."""
        # Before the events are read: a step is told of before it is saved, so each checkpoint comes with its figures.
        saved = self._checkpoints.find_new() if self._checkpoints is not None else []
        self._read_events()
        status = self._folder.read_status()
        if self._checkpoints is not None:
            await self._checkpoints.publish(saved, self._metrics, self._note_checkpoint)
        forget = self._checkpoints.outdated if self._checkpoints is not None else ()
        if self._events or self._points or forget or status != self._told:
            await self._keep(status, forget)
        if self._checkpoints is not None:
            await self._checkpoints.remove_outdated()

    def _read_events(self) -> None:
        for each in self._tail.new():
            if isinstance(each, Notice):
                each = Notice(self._folder.told(each.message))
            self._events.append(each.event)
            if isinstance(each, StepMetrics):
                self._metrics[each.step] = {**self._metrics.get(each.step, {}), **each.values}

    def _note_checkpoint(self, point: NewCheckpoint) -> None:
        text = f"Checkpoint created at step {point.step} with Snapshot ID: {point.model}"
        self._events.append(NewEvent(f"checkpoint:{point.step}", text, data={"step": point.step}))
        self._points.append(point)

    async def _keep(self, status: TrainerStatus, forget: Sequence[int]) -> None:
        events, points = list(self._events), list(self._points)
        values = columns_of(status, self._ledger.now())
        kept = await self._ledger.change(
            self._job_id, values, when=(RUNNING,), events=events, checkpoints=points, forget_steps=forget
        )
        if kept is None:  # paused or cancelled meanwhile: what is in the store is to be in the table all the same
            change = partial(self._ledger.change, self._job_id, checkpoints=points, forget_steps=forget)
            if await change(when=(PAUSED, QUEUED, PUBLISHING), events=events) is None:
                await change(when=(CANCELLED,))
        del self._events[: len(events)], self._points[: len(points)]
        self._told = status


def columns_of(status: TrainerStatus, now: int) -> dict[str, Any]:
    values: dict[str, Any] = {"heartbeat_at": now}
    if status.state:  # until a process has said its first word, what the server said of its work stands
        values["message"] = status.message
    for name in ("loss", "tokens_per_s", "eta_s", "trained_tokens"):
        value = getattr(status, name)
        if value is not None:
            values[name] = value
    if status.total_steps:
        values |= {"step": status.step, "total_steps": status.total_steps}
    return values
