"""`/v1/fine_tuning/jobs` on the wire: OpenAI's request and its job, event and checkpoint objects."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from onebase_server.api.schemas_common import ListPage, Metadata, RequestBody, RequestPart, Wire, no_nul
from onebase_server.jobs.names import ORGANIZATION
from onebase_server.jobs.states import on_the_wire
from onebase_server.records.tables import CheckpointRow, EventRow, JobRow

ORGANIZATION_ID = f"org-{ORGANIZATION}"


def number_or_word(value: Any) -> str:
    return "#word" if isinstance(value, str) else "#number"


Auto = Annotated[Literal["auto"], Tag("#word")]
either = Discriminator(number_or_word)

Epochs = Annotated[Auto | Annotated[int, Field(ge=1, le=50), Tag("#number")], either]
BatchSize = Annotated[Auto | Annotated[int, Field(ge=1, le=256), Tag("#number")], either]
# 5000 would be a learning rate of 1: nothing is learnt there, and the trainer refuses it.
Multiplier = Annotated[Auto | Annotated[float, Field(gt=0, lt=5000), Tag("#number")], either]


class Hyperparameters(RequestPart):
    """A null or absent one is "auto"."""

    n_epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None

    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Supervised(RequestPart):
    hyperparameters: Hyperparameters | None = None


class Method(RequestPart):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class Wandb(RequestPart):
    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(RequestPart):
    """Taken so that scripts run unchanged, and told in a warning event: nothing is sent to anybody."""

    type: Literal["wandb"]
    wandb: Wandb


class CreateJob(RequestBody):
    model: str
    """The base, or a fine-tuned model to go on from."""
    training_file: Annotated[str, no_nul]
    validation_file: Annotated[str, no_nul] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated at OpenAI; scripts still send it."""
    suffix: Annotated[str, Field(min_length=1, max_length=64), no_nul] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None


class JobErrorBody(Wire):
    code: str
    message: str
    param: str | None


class DecidedHyperparameters(Wire):
    """Numbers once the job's files are validated; "auto" until then where nothing was asked for."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class SupervisedReply(Wire):
    hyperparameters: DecidedHyperparameters


class MethodReply(Wire):
    type: Literal["supervised"]
    supervised: SupervisedReply


class FineTuningJob(Wire):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    hyperparameters: DecidedHyperparameters
    method: MethodReply
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobErrorBody | None
    seed: int
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]]
    user_provided_suffix: str | None


class JobList(ListPage):
    data: list[FineTuningJob]
    has_more: bool


class JobEvent(Wire):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(ListPage):
    data: list[JobEvent]
    has_more: bool


class Checkpoint(Wire):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class CheckpointList(ListPage):
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def job_object(row: JobRow) -> FineTuningJob:
    """A retrain job has its own hyperparameters; here they show as "auto", and its data by its file or path."""
    decided = DecidedHyperparameters.model_validate(
        {name: row.hyperparameters.get(name, "auto") for name in DecidedHyperparameters.model_fields}, strict=False
    )
    return FineTuningJob(
        id=row.id,
        object="fine_tuning.job",
        created_at=row.created_at,
        finished_at=row.finished_at,
        estimated_finish=None if row.eta_s is None or row.heartbeat_at is None else row.heartbeat_at + round(row.eta_s),
        model=row.model,
        fine_tuned_model=row.fine_tuned_model if row.state == "succeeded" else None,
        organization_id=ORGANIZATION_ID,
        status=on_the_wire(row.state),  # type: ignore[arg-type]  # pydantic checks it
        hyperparameters=decided,
        method=MethodReply(type="supervised", supervised=SupervisedReply(hyperparameters=decided)),
        training_file=row.training_file or row.dataset or "stored_chats",
        validation_file=row.validation_file,
        result_files=row.result_files,
        trained_tokens=row.trained_tokens if row.state == "succeeded" else None,
        error=None if row.error is None else JobErrorBody(**row.error),
        seed=row.seed,
        metadata=row.meta,
        integrations=[],
        user_provided_suffix=row.suffix,
    )


def event_object(row: EventRow) -> JobEvent:
    return JobEvent(
        id=row.id,
        object="fine_tuning.job.event",
        created_at=row.created_at,
        level=row.level,  # type: ignore[arg-type]  # pydantic checks it
        message=row.message,
        type=row.type,  # type: ignore[arg-type]  # pydantic checks it
        data=row.data or {},
    )


def checkpoint_object(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        id=row.id,
        object="fine_tuning.job.checkpoint",
        created_at=row.created_at,
        fine_tuned_model_checkpoint=row.model,
        fine_tuning_job_id=row.job_id,
        step_number=row.step,
        metrics=row.metrics,
    )
