"""`/admin/retrain` on the wire: this server's own, not OpenAI's."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from onebase_server.api.schemas_admin import AdapterName
from onebase_server.api.schemas_common import ListPage, RequestBody, RequestPart, Wire
from onebase_server.jobs.states import PAUSED, PUBLISHING, QUEUED, RUNNING, VALIDATING
from onebase_server.records.tables import JobRow

# A run has no state of its own for what a fine-tuning job shows in between.
SHOWN = {VALIDATING: QUEUED, PAUSED: QUEUED, PUBLISHING: RUNNING}


class RetrainHyperparameters(RequestPart):
    """Knobs of the recipe that a retrain may set; the preset gives the rest."""

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
    tokens_at_once: Annotated[int, Field(ge=1)] | None = None
    """Of a micro-batch: less takes less memory, and changes no result."""
    gradient_checkpointing: bool | None = None
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    device: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None


class GateSpec(RequestPart):
    """By how much the new version may be worse than the current one, on the same held-out conversations."""

    max_loss_increase: Annotated[float, Field(ge=0)] | None = None
    """Of the response loss, in nats a token. Default 0.02."""
    max_stop_rate_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the share of answers that end by themselves. Default 0.05."""
    max_examples: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Conversations to answer. Default 100."""


def switch_or_spec(value: Any) -> str:
    return "#switch" if isinstance(value, bool) else "#spec"


class RetrainFields(RequestPart):
    """What a retraining is, but for the adapter's name."""

    dataset: str | None = None
    """A file or a folder on the server, absolute or below one of the dataset folders."""
    training_file: str | None = None
    """An uploaded file's id."""
    stored_chats: bool | None = None
    """True: the adapter's stored chats that were marked good or were given a better answer."""
    preset: Literal["default", "seed"] = "default"
    prompt_format: Literal["human_response", "chat_template"] | None = None
    """Not given: that of the adapter's current version, else the preset's."""
    from_: Annotated[Literal["scratch", "current"] | None, Field(alias="from")] = None
    """"scratch" (the default) or "current": go on from the version that is served now."""
    resume_from: str | None = None
    """Any version (`name` or `name@3`) to go on from."""
    hyperparameters: RetrainHyperparameters | None = None
    gate: (
        Annotated[Annotated[bool, Tag("#switch")] | Annotated[GateSpec, Tag("#spec")], Discriminator(switch_or_spec)]
        | None
    ) = None
    """True, or margins: publish only if the new version is no worse than the current one."""
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    """Higher goes first."""


class RetrainRequest(RetrainFields, RequestBody):
    adapter: AdapterName


class RunError(Wire):
    code: str
    message: str
    param: str | None


class RetrainRun(Wire):
    """One retraining."""

    id: str
    object: Literal["retrain.run"]
    adapter: str
    dataset: str | None
    training_file: str | None
    preset: str
    hyperparameters: dict[str, Any]
    seed: int
    start_from: str | None
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int
    started_at: int | None
    finished_at: int | None
    step: int
    total_steps: int
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    message: str | None
    version: str | None
    """`name@N` that it published, or that did not pass the gate."""
    gate_report: dict[str, Any] | None
    """passed, reason, candidate, current: what the gate measured."""
    error: RunError | None


class RetrainList(ListPage):
    data: list[RetrainRun]


def retrain_run(row: JobRow) -> RetrainRun:
    return RetrainRun(
        id=row.id,
        object="retrain.run",
        adapter=row.adapter,
        dataset=row.dataset,
        training_file=row.training_file,
        preset=row.preset,
        hyperparameters=row.hyperparameters,
        seed=row.seed,
        start_from=row.start_from,
        state=SHOWN.get(row.state, row.state),  # type: ignore[arg-type]  # pydantic checks it
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        step=row.step,
        total_steps=row.total_steps,
        loss=row.loss,
        tokens_per_s=row.tokens_per_s,
        eta_s=row.eta_s,
        message=row.message,
        version=row.version,
        gate_report=row.gate_report,
        error=None if row.error is None else RunError(**row.error),
    )
