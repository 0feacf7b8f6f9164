"""What the admin calls give, typed. Fields that a newer server adds are kept and do no harm."""

from typing import Any, Literal

from openai import BaseModel


class ModelCard(BaseModel):
    """One line of `/v1/models`: what `model` may be, with this server's own fields."""

    id: str
    created: int
    root: str
    """The base's id."""
    parent: str | None = None
    """The base's id for an adapter, None for the base."""
    version: int | None = None
    residency: Literal["device", "host", "disk"] | None = None
    """Where that version is in the server's memory; None for the base."""


class ModelCards(BaseModel):
    data: list[ModelCard]


class Version(BaseModel):
    """One immutable version and where it is in the server's memory."""

    id: str
    version: int
    created_at: int
    prompt_format: str
    digest: str
    place: str
    """disk, loading, host, copying or slot."""
    leases: int
    pinned: bool
    metrics: dict[str, Any]
    error: str | None = None


class Share(BaseModel):
    version: int
    share: float


class Adapter(BaseModel):
    name: str
    current: str | None = None
    serving: list[Share]
    versions: list[Version]
    aliases: dict[str, int]


class Adapters(BaseModel):
    data: list[Adapter]


class RunError(BaseModel):
    code: str
    message: str
    param: str | None = None


class RetrainRun(BaseModel):
    id: str
    adapter: str
    preset: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    step: int
    total_steps: int
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    version: str | None = None
    gate_report: dict[str, Any] | None = None
    error: RunError | None = None


class RetrainRuns(BaseModel):
    data: list[RetrainRun]


class Schedule(BaseModel):
    """A retraining that orders itself. `note`: why its last time ordered nothing, if it did not."""

    id: str
    adapter: str
    cron: str | None = None
    every: str | None = None
    timezone: str
    retrain: dict[str, Any]
    created_at: int
    next_at: int
    last_at: int | None = None
    last_run: str | None = None
    last_state: str | None = None
    note: str | None = None


class Schedules(BaseModel):
    data: list[Schedule]


class Key(BaseModel):
    """A key without the key."""

    id: str
    name: str
    owner: str
    scopes: list[str]
    models: list[str] | None = None
    rpm: int | None = None
    tpm: int | None = None
    parallel: int | None = None
    created_at: int
    expires_at: int | None = None
    last_used_at: int | None = None
    revoked_at: int | None = None


class NewKey(Key):
    key: str
    """Shown this once."""


class Keys(BaseModel):
    data: list[Key]


class Deleted(BaseModel):
    id: str
    deleted: bool
