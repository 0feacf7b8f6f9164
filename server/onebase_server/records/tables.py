"""The tables. A change here needs a migration in `migrations/versions/`; a test compares the two.

`seq` is the primary key and the order of making; `id` is what clients see. Times are Unix seconds. Nothing here knows
what a state means: that is `jobs/states.py`.
"""

from typing import Any, ClassVar

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from onebase_server.records.stored_json import StoredJson

# SQLite counts rows only in a column of exactly this type; PostgreSQL should have the wide one.
RowNumber = BigInteger().with_variant(Integer, "sqlite")
Json = dict[str, Any]

LOCAL_OWNER = "local"  # owner of rows made while the server runs without keys


class Base(DeclarativeBase):
    """Named constraints, so that migrations can drop them on either database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        Json: StoredJson(dict),
        list[str]: StoredJson(list),
        str: Text,
        int: BigInteger,
    }


class FileRow(Base):
    """An uploaded or produced file. Its bytes lie under <home>/files/<id>; the name the client gave is data only."""

    __tablename__ = "files"
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    status: Mapped[str] = mapped_column(String(16))
    status_details: Mapped[str | None]


class JobRow(Base):
    """A job of either door: `kind` is "fine_tuning" (OpenAI's) or "retrain" (admin). One row, one run folder."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("owner", "idempotency_key"), Index("ix_jobs_queue", "state", "priority", "seq"))
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(24))
    priority: Mapped[int]
    created_at: Mapped[int]
    started_at: Mapped[int | None]
    finished_at: Mapped[int | None]
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_digest: Mapped[str] = mapped_column(String(64))

    model: Mapped[str]
    adapter: Mapped[str] = mapped_column(index=True)
    training_file: Mapped[str | None]
    validation_file: Mapped[str | None]
    dataset: Mapped[str | None]
    suffix: Mapped[str | None]
    seed: Mapped[int]
    preset: Mapped[str]
    start_from: Mapped[str | None]
    meta: Mapped[Json | None]
    method: Mapped[Json | None]
    hyperparameters: Mapped[Json]
    recipe: Mapped[Json]
    gate: Mapped[Json | None]
    served_before: Mapped[Json | None]

    attempt: Mapped[int]
    run_open: Mapped[bool] = mapped_column(index=True)
    saved_step: Mapped[int] = mapped_column(server_default="0")
    losses: Mapped[int] = mapped_column(server_default="0")
    step: Mapped[int]
    total_steps: Mapped[int]
    loss: Mapped[float | None]
    tokens_per_s: Mapped[float | None]
    eta_s: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    heartbeat_at: Mapped[int | None]
    message: Mapped[str | None]

    version: Mapped[str | None]
    fine_tuned_model: Mapped[str | None]
    result_files: Mapped[list[str]]
    error: Mapped[Json | None]
    gate_report: Mapped[Json | None]


class HomeRow(Base):
    """The one home folder whose files, runs and adapters these tables are about."""

    __tablename__ = "homes"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)


class EventRow(Base):
    """A line of a job's story. `key` names what it tells, so that telling it again after a crash adds nothing."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "key"), Index("ix_events_story", "job_id", "seq"))
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[int]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str]
    data: Mapped[Json | None]


class CheckpointRow(Base):
    """A servable state of an unfinished or finished job; `version` is its place in the adapter store."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[int]
    step: Mapped[int]
    model: Mapped[str]
    version: Mapped[str]
    metrics: Mapped[Json]


class ChatRow(Base):
    """A chat completion kept by `store: true`, as it was asked and answered."""

    __tablename__ = "stored_chats"
    __table_args__ = (Index("ix_stored_chats_adapter", "adapter", "seq"),)
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[int]
    model: Mapped[str]
    adapter: Mapped[str | None]
    version: Mapped[str | None]
    request: Mapped[Json]
    response: Mapped[Json]
    meta: Mapped[Json | None]
    rating: Mapped[str | None] = mapped_column(String(8))
    better_answer: Mapped[str | None]


class FeedbackRow(Base):
    """One judgement of a stored chat; the newest one is copied to the chat's `rating` and `better_answer`."""

    __tablename__ = "feedback"
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    chat_id: Mapped[str] = mapped_column(ForeignKey("stored_chats.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[int]
    rating: Mapped[str | None] = mapped_column(String(8))
    better_answer: Mapped[str | None]
    comment: Mapped[str | None]


class KeyRow(Base):
    """An API key. Only its hash is kept; `models` null means all of them, limits null mean none."""

    __tablename__ = "keys"
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(String(128), unique=True)
    scopes: Mapped[list[str]]
    models: Mapped[list[str] | None]
    rpm: Mapped[int | None]
    tpm: Mapped[int | None]
    parallel: Mapped[int | None]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    last_used_at: Mapped[int | None]
    revoked_at: Mapped[int | None]


class ScheduleRow(Base):
    """A retraining that is ordered again and again: at the times of `cron` in `timezone`, or `every` so long.

    `request` is the retrain request as it was sent, and means at each time what it would mean then.
    """

    __tablename__ = "schedules"
    seq: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    adapter: Mapped[str]
    cron: Mapped[str | None]
    every: Mapped[str | None]
    timezone: Mapped[str]
    request: Mapped[Json]
    created_at: Mapped[int]
    next_at: Mapped[int] = mapped_column(index=True)
    last_at: Mapped[int | None]
    last_run: Mapped[str | None]
    note: Mapped[str | None]
