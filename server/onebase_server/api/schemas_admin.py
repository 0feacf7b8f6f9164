"""`/admin/*` and the health checks on the wire: this server's own, not OpenAI's."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from onebase_server.api.schemas_common import ListPage, RequestBody, Wire

AdapterName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Health(Wire):
    status: Literal["ok", "ready"]


class Hyperparameters(Wire):
    """Knobs of the recipe that a retrain may set; the preset gives the rest."""

    model_config = ConfigDict(extra="forbid")

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    early_stopping: Annotated[int, Field(ge=1)] | None = None
    r: Annotated[int, Field(ge=1, le=512)] | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    use_rslora: bool | None = None
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    device: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None


class RetrainRequest(RequestBody):
    adapter: AdapterName
    dataset: str
    """A path on the server, absolute or below one of the dataset folders."""
    preset: Literal["default", "seed"] = "default"
    prompt_format: Literal["human_response", "chat_template"] | None = None
    """Not given: that of the adapter's current version, else the preset's."""
    resume_from: str | None = None
    """A version (`name` or `name@3`) to go on from."""
    hyperparameters: Hyperparameters | None = None


class RunError(Wire):
    code: str | None
    message: str
    param: str | None


class RetrainRun(Wire):
    """One retraining."""

    id: str
    object: Literal["retrain.run"]
    adapter: str
    dataset: str
    preset: str
    hyperparameters: dict[str, Any]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int
    started_at: int | None
    finished_at: int | None
    progress: dict[str, Any]
    """step, total_steps, loss, tokens_per_s, eta_s, epoch, message: as far as the trainer has told."""
    version: str | None
    """`name@N` that it published."""
    error: RunError | None


class RetrainList(ListPage):
    data: list[RetrainRun]


class ServedVersion(Wire):
    version: int
    share: float
    """Of the name's traffic."""


class VersionCard(Wire):
    """One version, and where it is now."""

    id: str
    version: int
    created_at: int
    prompt_format: str
    digest: str
    place: str
    """disk, loading, host, copying, slot: how near the device it is."""
    leases: int
    """Sequences on it, waiting ones included."""
    running: int
    pinned: bool
    host_bytes: int
    hits: int
    misses: int
    loads: int
    load_s: float | None
    last_used: float | None
    error: str | None
    metrics: dict[str, Any]


class AdapterCard(Wire):
    name: str
    object: Literal["adapter"]
    current: str | None
    """The version with the largest share."""
    serving: list[ServedVersion]
    versions: list[VersionCard]
    aliases: dict[str, int]


class AdapterList(ListPage):
    data: list[AdapterCard]


class VersionChoice(RequestBody):
    """Which version. Empty body: the one before (rollback), or the current one (unload, pin, preload)."""

    version: Annotated[int, Field(ge=1)] | None = None


class PublishRequest(RequestBody):
    """Serve one version, or split the traffic: `{"weights": {"3": 0.9, "4": 0.1}}`."""

    version: Annotated[int, Field(ge=1)] | None = None
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
