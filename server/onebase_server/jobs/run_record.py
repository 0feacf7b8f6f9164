"""A retrain run on disk: `runs/<id>/run.json` is the record, so a restarted server knows all that this one did.

The trainer's own file beside it (`status.json`) tells progress and outcome. Both are replaced atomically.
"""

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from onebase.durable import replace_file

RunState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINAL: tuple[RunState, ...] = ("succeeded", "failed", "cancelled")
RUN_ID = re.compile(r"^run-[0-9]{10}-[0-9a-f]{8}$")


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as far as the server knows it."""

    id: str
    adapter: str
    dataset: str
    preset: str
    hyperparameters: dict[str, Any]
    created_at: int
    """Unix seconds, as all times here."""
    state: RunState = "queued"
    started_at: int | None = None
    finished_at: int | None = None
    cancel_requested: bool = False
    pid: int | None = None
    pid_created: float | None = None
    """When the process began, by the system: a pid alone may have been given to another process since."""
    version: str | None = None
    """`name@N`, once published."""
    error: dict[str, Any] | None = None
    """OpenAI's {code, message, param} of a failed run."""
    progress: dict[str, Any] = field(default_factory=dict)
    """The trainer's last figures: step, total_steps, loss, tokens_per_s, eta_s, epoch, message."""

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


def new_run(adapter: str, dataset: str, preset: str, hyperparameters: dict[str, Any]) -> Run:
    now = int(time.time())
    return Run(f"run-{now:010d}-{secrets.token_hex(4)}", adapter, dataset, preset, hyperparameters, now)


class RunFolder:
    """The files of one run."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.path = root / run_id

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def status(self) -> Path:
        """Written by the trainer."""
        return self.path / "status.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    def create(self) -> None:
        self.path.mkdir(parents=True)

    def write(self, run: Run) -> None:
        replace_file(self.record, json.dumps(asdict(run), indent=2, ensure_ascii=False).encode())

    def read(self) -> Run | None:
        """None if there is no record here that can be read (a folder of another kind, or of a newer server)."""
        known = {each.name for each in fields(Run)}
        try:
            values = json.loads(self.record.read_text("utf-8"))
            return Run(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def read_status(self) -> dict[str, Any]:
        """The trainer's last word; {} before its first."""
        try:
            status = json.loads(self.status.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def log_tail(self, size: int = 2000) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - size))
                return file.read().decode("utf-8", errors="replace").strip()
        except OSError:
            return ""


def with_progress(run: Run, status: dict[str, Any]) -> Run:
    """The run with the trainer's figures, for those who ask while it runs."""
    names = ("step", "total_steps", "loss", "tokens_per_s", "eta_s", "epoch", "message")
    return replace(run, progress={name: status[name] for name in names if status.get(name) is not None})
