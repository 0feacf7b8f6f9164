"""`/v1/fine_tuning/jobs`: make, list, follow, steer. What a request means is decided here; `jobs/` carries it out."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from litestar import Request, get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.types import ASGIApp

from onebase.errors import InvalidInput, OnebaseError
from onebase_server.api.backend import Backend
from onebase_server.api.caller import Caller, caller_of
from onebase_server.api.deps import AppDeps, Deps
from onebase_server.api.query import metadata_filter
from onebase_server.api.quota import check_adapter_quota
from onebase_server.api.replies import json_reply
from onebase_server.api.schemas_common import RequestBody
from onebase_server.api.schemas_fine_tuning import (
    CheckpointList,
    CreateJob,
    EventList,
    FineTuningJob,
    JobList,
    Method,
    checkpoint_object,
    event_object,
    job_object,
)
from onebase_server.api.sse import EventStream, event
from onebase_server.api.visible import visible_model, visible_version
from onebase_server.jobs.hyperparameters import AUTO
from onebase_server.jobs.orders import Base, FineTuningOrder, Once
from onebase_server.jobs.states import FINE_TUNING

AnyRequest = Request[Any, Any, Any]
Limit = Annotated[int, QueryParameter(ge=1, le=1000)]
MAX_KEY = 255


@post("/fine_tuning/jobs", operation_id="createFineTuningJob", status_code=200, tags=["Fine-tuning"])
async def create_job(data: JSONBody[CreateJob], request: AnyRequest, deps: Deps) -> FineTuningJob:
    """Queue a fine-tuning job on the served base, or on top of a fine-tuned model."""
    caller, once = caller_of(request), once_of(data, request)
    job = await deps.jobs.made_before(caller.owner, once)
    if job is None:
        await check_adapter_quota(caller, deps)
        job = await deps.jobs.fine_tune(await order_of(data, caller, deps), caller.sees, once)
    return job_object(job)


@get("/fine_tuning/jobs", operation_id="listFineTuningJobs", tags=["Fine-tuning"])
async def list_jobs(request: AnyRequest, deps: Deps, after: FromQuery[str | None] = None, limit: Limit = 20) -> JobList:
    """The caller's jobs, newest first; `metadata[key]=value` and `metadata=null` filter them."""
    page = await deps.jobs.list(
        caller_of(request).sees,
        kind=FINE_TUNING,
        metadata=metadata_filter(request.query_params),
        after=after,
        limit=limit,
    )
    return JobList(object="list", data=[job_object(row) for row in page.rows], has_more=page.has_more)


@get("/fine_tuning/jobs/{job_id:str}", operation_id="retrieveFineTuningJob", tags=["Fine-tuning"])
async def retrieve_job(job_id: FromPath[str], request: AnyRequest, deps: Deps) -> FineTuningJob:
    """One job."""
    return job_object(await deps.jobs.get(job_id, caller_of(request).sees))


@post(
    "/fine_tuning/jobs/{job_id:str}/cancel", operation_id="cancelFineTuningJob", status_code=200, tags=["Fine-tuning"]
)
async def cancel_job(job_id: FromPath[str], request: AnyRequest, deps: Deps) -> FineTuningJob:
    """Cancel a job that has not ended; its memory is free within seconds."""
    return job_object(await deps.jobs.cancel(job_id, caller_of(request).sees))


@post("/fine_tuning/jobs/{job_id:str}/pause", operation_id="pauseFineTuningJob", status_code=200, tags=["Fine-tuning"])
async def pause_job(job_id: FromPath[str], request: AnyRequest, deps: Deps) -> FineTuningJob:
    """Pause a job: a checkpoint is kept, its memory is freed."""
    return job_object(await deps.jobs.pause(job_id, caller_of(request).sees))


@post(
    "/fine_tuning/jobs/{job_id:str}/resume", operation_id="resumeFineTuningJob", status_code=200, tags=["Fine-tuning"]
)
async def resume_job(job_id: FromPath[str], request: AnyRequest, deps: Deps) -> FineTuningJob:
    """Queue a paused job again."""
    return job_object(await deps.jobs.resume(job_id, caller_of(request).sees))


@get("/fine_tuning/jobs/{job_id:str}/events", operation_id="listFineTuningEvents", tags=["Fine-tuning"])
async def list_events(
    job_id: FromPath[str],
    request: AnyRequest,
    deps: Deps,
    after: FromQuery[str | None] = None,
    limit: Limit = 20,
    stream: Annotated[
        bool, QueryParameter(description="Server-sent events, oldest first, until the job ends.")
    ] = False,
) -> ASGIApp:
    """What has happened, newest first; or, streamed, what happens."""
    sees = caller_of(request).sees
    if stream:
        await deps.jobs.get(job_id, sees)
        return EventStream(follow(job_id, deps), lambda: None, ping_s=deps.settings.ping_s)
    page = await deps.jobs.events(job_id, sees, after=after, limit=limit)
    data = [event_object(row) for row in page.rows]
    return json_reply(EventList(object="list", data=data, has_more=page.has_more))


@get("/fine_tuning/jobs/{job_id:str}/checkpoints", operation_id="listFineTuningJobCheckpoints", tags=["Fine-tuning"])
async def list_checkpoints(
    job_id: FromPath[str], request: AnyRequest, deps: Deps, after: FromQuery[str | None] = None, limit: Limit = 10
) -> CheckpointList:
    """The newest three checkpoints, newest first. Each is a model that can be called: deleted ones are left out."""
    page = await deps.jobs.checkpoints(job_id, caller_of(request).sees, after=after, limit=limit)
    data = [checkpoint_object(row) for row in page.rows if exists(row.model, deps)]
    return CheckpointList(
        object="list",
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


def exists(model: str, deps: AppDeps) -> bool:
    try:
        deps.store.resolve(model)
    except OnebaseError:  # removed by an admin, or damaged
        return False
    return True


async def follow(job_id: str, deps: AppDeps) -> AsyncIterator[bytes]:
    async for row in deps.jobs.follow(job_id):
        yield event(event_object(row))


async def order_of(body: CreateJob, caller: Caller, deps: AppDeps) -> FineTuningOrder:
    """Raises InvalidInput, or ModelNotFound for a model that is neither the base nor fine-tuned from it."""
    refuse_other_methods(body.method)
    hyperparameters = hyperparameters_of(body)
    backend = deps.backend.get()
    start_from, prompt_format = await starting_point(body.model, caller, backend, deps)
    return FineTuningOrder(
        owner=caller.owner,
        base=Base(backend.base.id, str(backend.base.path)),
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        start_from=start_from,
        suffix=body.suffix,
        seed=body.seed,
        metadata=body.metadata,
        hyperparameters=hyperparameters,
        has_integrations=bool(body.integrations),
        prompt_format=prompt_format,
    )


async def starting_point(model: str, caller: Caller, backend: Backend, deps: AppDeps) -> tuple[str | None, str | None]:
    """The version to go on from and its prompt format; nothing of both for the base."""
    if model == backend.base.id:
        await visible_model(model, caller, backend, deps)
        return None, None
    version = await visible_version(model, caller, backend, deps)
    return version.id, version.prompt_format


def refuse_other_methods(method: Method | None) -> None:
    if method is not None and method.type != "supervised":
        raise InvalidInput(
            f"The '{method.type}' method is not offered here. Use 'supervised'.",
            param="method.type",
            code="invalid_value",
        )


def hyperparameters_of(body: CreateJob) -> dict[str, Any]:
    """From the method, or from where older scripts put them. Both are fine as long as they agree."""
    old = body.hyperparameters.given() if body.hyperparameters else {}
    supervised = body.method.supervised if body.method else None
    new = supervised.hyperparameters.given() if supervised and supervised.hyperparameters else {}
    differing = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    if differing:
        raise InvalidInput(
            f"'hyperparameters.{differing[0]}' and 'method.supervised.hyperparameters.{differing[0]}' differ. "
            "Give one of them.",
            param=f"hyperparameters.{differing[0]}",
            code="invalid_value",
        )
    return {**AUTO, **old, **new}


def once_of(body: RequestBody, request: AnyRequest) -> Once | None:
    """The `Idempotency-Key` header with what it stands for. Raises InvalidInput for one of no use."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_KEY:
        raise InvalidInput(f"'Idempotency-Key' must have 1 to {MAX_KEY} characters.", param="Idempotency-Key")
    return Once.of(key, request.url.path, body.model_dump(mode="json", by_alias=True, exclude_none=True))
