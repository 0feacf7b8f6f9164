"""`/v1/models`: the base and every adapter, as OpenAI lists models, and deleting what one has trained."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from litestar import Request, delete, get
from litestar.params import FromPath, QueryParameter

from onebase.errors import Forbidden
from onebase.store import Version
from onebase_server.api.backend import Backend
from onebase_server.api.caller import caller_of
from onebase_server.api.deps import Deps
from onebase_server.api.removal import check_may_delete, check_no_job, remove_when_unused
from onebase_server.api.schemas_models import ModelCard, ModelDeleted, ModelList, Residency
from onebase_server.api.visible import may_use, may_use_base, visible_model, visible_version
from onebase_server.engine.residence import Place

RESIDENCY: Mapping[Place, Residency] = {
    Place.DISK: "disk",
    Place.LOADING: "disk",
    Place.HOST: "host",
    Place.COPYING: "host",
    Place.SLOT: "device",
}
"""A version that is on its way counts as where it still is."""


@get("/models", operation_id="listModels", tags=["Models"])
async def list_models(
    request: Request[Any, Any, Any],
    deps: Deps,
    versions: Annotated[bool, QueryParameter(description="Also list every version as `name@N`.")] = False,
) -> ModelList:
    """The base first, then the adapters by name, each with its aliases (`ft:...`)."""
    backend = deps.backend.get()
    caller = caller_of(request)
    cards = [base_card(backend)] if may_use_base(caller, backend) else []
    for entry in deps.store.list():
        if not await may_use(entry.name, entry.versions, caller, deps):
            continue
        if entry.current is not None:
            cards.append(adapter_card(entry.name, entry.current, backend))
        by_number = {each.version: each for each in entry.versions}
        cards += [adapter_card(alias, by_number[number], backend) for alias, number in sorted(entry.aliases.items())]
        if versions:
            cards += [adapter_card(each.id, each, backend) for each in entry.versions]
    return ModelList(object="list", data=cards)


@get("/models/{model_id:path}", operation_id="retrieveModel", tags=["Models"])
async def retrieve_model(model_id: FromPath[str], request: Request[Any, Any, Any], deps: Deps) -> ModelCard:
    """One model by its id: a base, `adapter`, or `adapter@version`."""
    backend = deps.backend.get()
    name = model_id.removeprefix("/")
    caller = caller_of(request)
    if name == backend.base.id:
        await visible_model(name, caller, backend, deps)
        return base_card(backend)
    version = await visible_version(name, caller, backend, deps)
    return adapter_card(name, version, backend)


@delete(
    "/models/{model_id:path}",
    operation_id="deleteModel",
    status_code=200,
    opt={"scope": "training", "audited": True},
    tags=["Models"],
)
async def delete_model(model_id: FromPath[str], deps: Deps, request: Request[Any, Any, Any]) -> ModelDeleted:
    """Delete a fine-tuned model (`ft:...`), an adapter with all versions, or a version that is not served.

    The name is gone at once, running requests finish. Takes the key whose job trained it, or an admin's.
    """
    backend = deps.backend.get()
    name = model_id.removeprefix("/")
    if name == backend.base.id:
        raise Forbidden(f"The base `{name}` can't be deleted: only fine-tuned models can.")
    version = await visible_version(name, caller_of(request), backend, deps)
    await check_may_delete(version, request, deps)
    await check_no_job(name, version, deps)
    await asyncio.to_thread(remove_when_unused, name, version, backend.engine, deps.store)
    return ModelDeleted(id=name, object="model", deleted=True)


def base_card(backend: Backend) -> ModelCard:
    name = backend.base.id
    return ModelCard(
        id=name,
        object="model",
        created=backend.created,
        owned_by="onebase",
        root=name,
        parent=None,
        version=None,
        residency=None,
    )


def adapter_card(name: str, version: Version, backend: Backend) -> ModelCard:
    base = backend.base.id
    return ModelCard(
        id=name,
        object="model",
        created=version.created_at,
        owned_by="onebase",
        root=base,
        parent=base,
        version=version.version,
        residency=RESIDENCY[backend.engine.place_of(version.digest)],
    )
