"""`/admin/schedules` on the wire: this server's own, not OpenAI's."""

from typing import Any, Literal

from onebase_server.api.schemas_admin import AdapterName
from onebase_server.api.schemas_common import ListPage, RequestBody, Wire
from onebase_server.api.schemas_retrain import RetrainFields
from onebase_server.records.tables import ScheduleRow


class ScheduledRetrain(RetrainFields):
    """The body of POST /admin/retrain without `adapter`. Names such as "current" mean what they mean at each time."""


class CreateSchedule(RequestBody):
    adapter: AdapterName
    cron: str | None = None
    """Five fields: minute, hour, day of the month, month, day of the week. "0 3 * * *" is each night at three."""
    every: str | None = None
    """Instead of `cron`: a span such as 30m, 6h, 1d or 2w, from now on."""
    timezone: str | None = None
    """Of `cron`, such as Europe/Berlin. Default: UTC."""
    retrain: ScheduledRetrain


class Schedule(Wire):
    """A retraining that orders itself."""

    id: str
    object: Literal["schedule"]
    adapter: str
    cron: str | None
    every: str | None
    timezone: str
    retrain: dict[str, Any]
    created_at: int
    next_at: int
    last_at: int | None
    """When it last ordered a run."""
    last_run: str | None
    """The run's id."""
    last_state: str | None
    """How that run is, or how it ended."""
    note: str | None
    """Why the last time ordered nothing, if it did not."""


class ScheduleList(ListPage):
    data: list[Schedule]


class ScheduleDeleted(Wire):
    id: str
    object: Literal["schedule"]
    deleted: Literal[True]


def schedule_object(row: ScheduleRow, last_state: str | None) -> Schedule:
    return Schedule(
        id=row.id,
        object="schedule",
        adapter=row.adapter,
        cron=row.cron,
        every=row.every,
        timezone=row.timezone,
        retrain=row.request,
        created_at=row.created_at,
        next_at=row.next_at,
        last_at=row.last_at,
        last_run=row.last_run,
        last_state=last_state,
        note=row.note,
    )
