"""`/admin/retrain`: train an adapter's next version beside serving, in one call; published only if its gate holds."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from litestar import Request, get, post
from litestar.params import FromPath, JSONBody

from onebase.errors import InvalidInput, NotFound
from onebase.store import AdapterStore
from onebase_server.api.audit import tell_target
from onebase_server.api.caller import caller_of
from onebase_server.api.datasets import find_dataset
from onebase_server.api.deps import AppDeps, Deps
from onebase_server.api.fine_tuning import once_of
from onebase_server.api.schemas_retrain import RetrainList, RetrainRequest, RetrainRun, retrain_run
from onebase_server.jobs.orders import Base, Gate, RetrainOrder
from onebase_server.jobs.states import RETRAIN
from onebase_server.records.tables import JobRow

AnyRequest = Request[Any, Any, Any]
NEWEST = 1000


@post("/retrain", operation_id="createRetrainRun", status_code=200, tags=["Admin"])
async def create_retrain_run(data: JSONBody[RetrainRequest], request: AnyRequest, deps: Deps) -> RetrainRun:
    """Queue a training run from a dataset, an uploaded file, or stored chats that were marked good.

    A good end publishes the adapter's next version, which is served at once. With a gate it is published only if it
    is no worse than the current one on held-out conversations; the answer then says why not.
    """
    owner, once = caller_of(request).owner, once_of(data, request)
    job = await deps.jobs.made_before(owner, once)
    job = job or await deps.jobs.retrain(to_order(data, owner, deps), None, once)
    tell_target(request, f"{job.id} of {job.adapter}")
    return retrain_run(job)


@get("/retrain", operation_id="listRetrainRuns", tags=["Admin"])
async def list_retrain_runs(deps: Deps) -> RetrainList:
    """The runs, newest first."""
    page = await deps.jobs.list(None, kind=RETRAIN, metadata=None, after=None, limit=NEWEST)
    return RetrainList(object="list", data=[retrain_run(row) for row in page.rows])


@get("/retrain/{run_id:str}", operation_id="getRetrainRun", tags=["Admin"])
async def get_retrain_run(run_id: FromPath[str], deps: Deps) -> RetrainRun:
    """A run's state and progress. Its events: GET /v1/fine_tuning/jobs/{id}/events."""
    return retrain_run(await find_run(run_id, deps))


@post("/retrain/{run_id:str}/cancel", operation_id="cancelRetrainRun", status_code=200, tags=["Admin"])
async def cancel_retrain_run(run_id: FromPath[str], deps: Deps) -> RetrainRun:
    """Cancel a run; nothing is published."""
    await find_run(run_id, deps)
    return retrain_run(await deps.jobs.cancel(run_id, None))


async def find_run(run_id: str, deps: AppDeps) -> JobRow:
    try:
        return await deps.jobs.get(run_id, None)
    except NotFound as error:
        raise NotFound(f"No such run: {run_id}", param="id") from error


def to_order(data: RetrainRequest, owner: str, deps: AppDeps) -> RetrainOrder:
    """An adapter that exists keeps its prompt format, unless told otherwise: its clients know no other."""
    if sum([data.dataset is not None, data.training_file is not None, bool(data.stored_chats)]) != 1:
        raise InvalidInput(
            "Give exactly one of 'dataset', 'training_file' and 'stored_chats'.", param="dataset", code="invalid_value"
        )
    dataset = None
    if data.dataset is not None:
        dataset = find_dataset(data.dataset, deps.settings.home, deps.settings.dataset_roots)
    entry = deps.store.get(data.adapter)
    current = entry.current if entry else None
    hyperparameters = data.hyperparameters.model_dump(exclude_none=True) if data.hyperparameters else {}
    base = deps.backend.get().base
    return RetrainOrder(
        owner=owner,
        base=Base(base.id, str(base.path)),
        adapter=data.adapter,
        dataset=dataset,
        training_file=data.training_file,
        stored_chats=bool(data.stored_chats),
        preset=data.preset,
        hyperparameters={name: value for name, value in hyperparameters.items() if name != "seed"},
        prompt_format=data.prompt_format or (current.prompt_format if current else None),
        start_from=start_of(data, current.id if current else None, deps),
        seed=hyperparameters.get("seed"),
        gate=gate_of(data),
        priority=data.priority or 0,
        served_now=partial(served_by, data.adapter, deps.store),
    )


def served_by(adapter: str, store: AdapterStore) -> Mapping[int, float]:
    """Version -> share of the traffic; empty if there is no such adapter."""
    entry = store.get(adapter)
    return entry.weights if entry else {}


def start_of(data: RetrainRequest, current: str | None, deps: AppDeps) -> str | None:
    """The version to go on from. Raises ModelNotFound, or InvalidInput where there is no current one."""
    if data.resume_from is not None:
        if data.from_ is not None:
            raise InvalidInput("Give 'from' or 'resume_from', not both.", param="from", code="invalid_value")
        return deps.store.resolve(data.resume_from).id
    if data.from_ != "current":
        return None
    if current is None:
        raise InvalidInput(
            f"'{data.adapter}' has no current version to go on from: train it from scratch first.",
            param="from",
            code="invalid_value",
        )
    return current


def gate_of(data: RetrainRequest) -> Gate | None:
    if data.gate is None or data.gate is False:
        return None
    if data.gate is True:
        return Gate()
    return Gate(**data.gate.model_dump(exclude_none=True))
