"""A job's folder, `<home>/runs/<job id>/`: what its processes read and write, and the lock that says one is alive.

The lock is taken by the server before it starts a process and handed over as an open file: the kernel keeps it as
long as that process (or a child of it) lives, whatever happens to the server, and drops it at once when they die. So
"is a run alive" has one answer, with no window in which a second process could be started, and no pid to mistake.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase.durable import fsync_folder
from onebase_server.jobs.words import without_paths


@dataclass(frozen=True, slots=True)
class TrainerStatus:
    """The trainer's last word, from its status file. All empty before its first."""

    state: str = ""
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    trained_tokens: int | None = None
    message: str | None = None
    version: str | None = None
    error: dict[str, Any] | None = None


class RunFolder:
    """Paths and small files of one job."""

    def __init__(self, root: Path, job_id: str) -> None:
        self.path = root / job_id
        self.recipe = self.path / "recipe.yaml"
        self.training = self.path / "training.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.dataset = self.path / "dataset"
        self.dataset_part = self.path / "dataset.part"
        self.status = self.path / "status.json"
        self.events = self.path / "status.json.events.jsonl"
        self.work = self.path / "work"
        self.log = self.path / "train.log"
        self.evaluation = self.path / "evaluation.json"
        self.lock = self.path / "lock"

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def sync(self) -> None:
        """Make what was put in durable, before a row tells of it."""
        for path in (self.training, self.validation):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        for folder in (self.path, self.path.parent):
            fsync_folder(folder)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_checkpoints(self) -> None:
        """Optimiser states are large and of no use once the job has ended. The log and the metrics stay."""
        shutil.rmtree(self.work, ignore_errors=True)

    def remove_data(self) -> None:
        """The job's own names for its files' bytes, and copies: after its end a deleted file is to be gone."""
        for copy in (self.dataset, self.dataset_part):
            shutil.rmtree(copy, ignore_errors=True)
        self.training.unlink(missing_ok=True)
        self.validation.unlink(missing_ok=True)

    @property
    def has_leftovers(self) -> bool:
        """Whether anything is there that goes at the job's end."""
        ours = (self.work, self.training, self.validation, self.dataset, self.dataset_part)
        return any(path.exists() for path in ours)

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """The lock's file descriptor, to hand to a process; None if a process of this run is alive."""
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield fd
        finally:
            os.close(fd)  # closing, unlike unlocking, leaves the lock to those who were handed it

    def is_alive(self) -> bool:
        """Whether a process of this run holds the lock."""
        if not self.lock.exists():
            return False
        with self.locked() as fd:
            return fd is None

    def told(self, text: str) -> str:
        """What a process of the run said, as its owner may read it."""
        return without_paths(text, self.path)

    def read_status(self) -> TrainerStatus:
        try:
            values = json.loads(self.status.read_text("utf-8"))
        except (OSError, ValueError):
            return TrainerStatus()
        return to_status(values, self.told) if isinstance(values, dict) else TrainerStatus()

    def last_sign_of_life(self) -> float:
        """Unix seconds at which a process last wrote anything; 0 if none ever did."""
        times = [path.stat().st_mtime for path in (self.status, self.events, self.log) if path.exists()]
        return max(times, default=0.0)

    def log_tail(self, size: int = 2000) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - size))
                return file.read().decode("utf-8", errors="replace").strip()
        except OSError:
            return ""


def to_status(values: dict[str, Any], told: Callable[[str], str] = str) -> TrainerStatus:
    """Another process wrote it: a value of a wrong type is as good as none. `told` makes its words fit to be shown."""

    def number(name: str) -> float | None:
        value = values.get(name)
        return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None

    def text(name: str) -> str | None:
        value = values.get(name)
        return value if isinstance(value, str) else None

    tokens, error, message = number("trained_tokens"), values.get("error"), text("message")
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        error = {**error, "message": told(error["message"])}
    return TrainerStatus(
        state=text("state") or "",
        step=int(number("step") or 0),
        total_steps=int(number("total_steps") or 0),
        loss=number("loss"),
        tokens_per_s=number("tokens_per_s"),
        eta_s=number("eta_s"),
        trained_tokens=None if tokens is None else int(tokens),
        message=None if message is None else told(message),
        version=text("version"),
        error=error if isinstance(error, dict) else None,
    )
