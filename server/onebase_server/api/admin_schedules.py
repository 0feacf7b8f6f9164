"""`/admin/schedules`: retrainings that order themselves. When they come is `jobs/schedules.py`'s business."""

from typing import Any

from litestar import Request, delete, get, post
from litestar.params import FromPath, JSONBody

from onebase.errors import InvalidInput, NotFound, OnebaseError
from onebase_server.api.admin_retrain import to_order
from onebase_server.api.audit import tell_target
from onebase_server.api.caller import caller_of
from onebase_server.api.deps import AppDeps, Deps
from onebase_server.api.schemas_retrain import SHOWN, RetrainRequest
from onebase_server.api.schemas_schedules import (
    CreateSchedule,
    Schedule,
    ScheduleDeleted,
    ScheduleList,
    schedule_object,
)
from onebase_server.jobs.orders import RetrainOrder
from onebase_server.jobs.schedule_times import Timing
from onebase_server.records.tables import ScheduleRow


@post("/schedules", operation_id="createSchedule", status_code=200, tags=["Admin"])
async def create_schedule(data: JSONBody[CreateSchedule], request: Request[Any, Any, Any], deps: Deps) -> Schedule:
    """Retrain an adapter by a cron line or every so often. What was missed while no server ran is made up for once."""
    owner = caller_of(request).owner
    order = request_of(data)
    check_now(data.adapter, order, owner, deps)
    row = await deps.durable.scheduler.add(data.adapter, timing_of(data), order, owner)
    tell_target(request, f"{row.id} of {row.adapter}")
    return schedule_object(row, None)


@get("/schedules", operation_id="listSchedules", tags=["Admin"])
async def list_schedules(deps: Deps) -> ScheduleList:
    """All schedules, each with its next time and its last run."""
    rows = await deps.durable.scheduler.records.list()
    return ScheduleList(object="list", data=[schedule_object(row, await state_of(row, deps)) for row in rows])


@delete("/schedules/{schedule_id:str}", operation_id="deleteSchedule", status_code=200, tags=["Admin"])
async def delete_schedule(schedule_id: FromPath[str], deps: Deps) -> ScheduleDeleted:
    """Order no more. A run that is going goes on."""
    if not await deps.durable.scheduler.records.remove(schedule_id):
        raise NotFound(f"No such schedule: {schedule_id}", param="id")
    return ScheduleDeleted(id=schedule_id, object="schedule", deleted=True)


def scheduled_order(row: ScheduleRow, deps: AppDeps) -> RetrainOrder:
    """What the schedule's request means now. Raises OnebaseError."""
    return to_order(RetrainRequest.model_validate({**row.request, "adapter": row.adapter}), row.owner, deps)


def request_of(data: CreateSchedule) -> dict[str, Any]:
    """As it is kept: the fields that were given."""
    return data.retrain.model_dump(mode="json", by_alias=True, exclude_none=True)


def timing_of(data: CreateSchedule) -> Timing:
    return Timing(data.cron, data.every, data.timezone or "UTC")


def check_now(adapter: str, order: dict[str, Any], owner: str, deps: AppDeps) -> None:
    """What could not be ordered now is refused now, and not at three in the morning."""
    try:
        to_order(RetrainRequest.model_validate({**order, "adapter": adapter}), owner, deps)
    except InvalidInput as error:
        raise InvalidInput(error.message, param=f"retrain.{error.param}", code=error.code) from error


async def state_of(row: ScheduleRow, deps: AppDeps) -> str | None:
    if row.last_run is None:
        return None
    try:
        state = (await deps.jobs.get(row.last_run, None)).state
    except OnebaseError:  # its row was removed by hand
        return None
    return SHOWN.get(state, state)
