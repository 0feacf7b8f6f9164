"""`/admin/retrain`: train an adapter's next version beside serving, in one call."""

from pathlib import Path

from litestar import get, post
from litestar.params import FromPath, JSONBody

from onebase_server.api.datasets import find_dataset
from onebase_server.api.deps import AppDeps, Deps
from onebase_server.api.schemas_admin import RetrainList, RetrainRequest, RetrainRun, RunError
from onebase_server.jobs.recipe import RetrainOrder
from onebase_server.jobs.run_record import Run


@post("/retrain", operation_id="createRetrainRun", status_code=200, tags=["Admin"])
async def create_retrain_run(data: JSONBody[RetrainRequest], deps: Deps) -> RetrainRun:
    """Queue a training run. A good end publishes the adapter's next version, which is served at once."""
    dataset = find_dataset(data.dataset, deps.settings.home, deps.settings.dataset_roots)
    return to_wire(deps.jobs.submit(to_order(data, dataset, deps)))


@get("/retrain", operation_id="listRetrainRuns", tags=["Admin"])
async def list_retrain_runs(deps: Deps) -> RetrainList:
    """All runs, newest first."""
    return RetrainList(object="list", data=[to_wire(run) for run in deps.jobs.list()])


@get("/retrain/{run_id:str}", operation_id="getRetrainRun", tags=["Admin"])
async def get_retrain_run(run_id: FromPath[str], deps: Deps) -> RetrainRun:
    """A run's state and progress."""
    return to_wire(deps.jobs.get(run_id))


@post("/retrain/{run_id:str}/cancel", operation_id="cancelRetrainRun", status_code=200, tags=["Admin"])
async def cancel_retrain_run(run_id: FromPath[str], deps: Deps) -> RetrainRun:
    """Cancel a run; nothing is published."""
    return to_wire(deps.jobs.cancel(run_id))


def to_order(data: RetrainRequest, dataset: Path, deps: AppDeps) -> RetrainOrder:
    """An adapter that exists keeps its prompt format, unless told otherwise: its clients know no other."""
    current = deps.store.get(data.adapter)
    known = current.current.manifest.prompt_format if current and current.current else None
    if data.resume_from is not None:
        deps.store.resolve(data.resume_from)
    hyperparameters = data.hyperparameters.model_dump(exclude_none=True) if data.hyperparameters else {}
    return RetrainOrder(
        adapter=data.adapter,
        dataset=dataset,
        base=str(deps.backend.get().base.path),
        preset=data.preset,
        prompt_format=data.prompt_format or known,
        resume_from=data.resume_from,
        hyperparameters=hyperparameters,
    )


def to_wire(run: Run) -> RetrainRun:
    return RetrainRun(
        id=run.id,
        object="retrain.run",
        adapter=run.adapter,
        dataset=run.dataset,
        preset=run.preset,
        hyperparameters=run.hyperparameters,
        state=run.state,
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at,
        progress=run.progress,
        version=run.version,
        error=RunError(**run.error) if run.error else None,
    )
