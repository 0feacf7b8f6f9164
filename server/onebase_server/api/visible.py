"""Which models a caller may know of: the one place that decides it. Others are as good as not there.

An adapter that a key's job trained is its owner's. All others are everyone's, unless the key has a list of models. One
whose name says that a job trained it, while no record tells whose job, is shown to nobody but admins.
"""

from collections.abc import Iterable

from onebase.errors import ModelNotFound
from onebase.store import AdapterStore, Version
from onebase_server.api.backend import Backend
from onebase_server.api.caller import Caller
from onebase_server.api.deps import AppDeps
from onebase_server.api.models_lookup import ServedModel, find_version, look_up
from onebase_server.jobs.states import FINE_TUNING

TUNED = "ft:"


async def visible_model(model: str, caller: Caller, backend: Backend, deps: AppDeps) -> ServedModel:
    """As `look_up`, for this caller. Raises ModelNotFound, whose near names the caller may know."""
    if model == backend.base.id:
        if not may_use_base(caller, backend):
            raise ModelNotFound(model)
        return look_up(model, backend, deps.store)
    await visible_version(model, caller, backend, deps)
    return look_up(model, backend, deps.store)


async def visible_version(model: str, caller: Caller, backend: Backend, deps: AppDeps) -> Version:
    """As `find_version`, for this caller."""
    try:
        version = find_version(model, backend, deps.store)
    except ModelNotFound as error:
        near = [name for name in error.near if await may_know(name, caller, backend, deps)]
        raise ModelNotFound(model, near) from error
    if not await may_use(version.name, [version], caller, deps):
        raise ModelNotFound(model)
    return version


def may_use_base(caller: Caller, backend: Backend) -> bool:
    return caller.is_admin or caller.models is None or backend.base.id in caller.models


async def may_use(name: str, versions: Iterable[Version], caller: Caller, deps: AppDeps) -> bool:
    """Whether the adapter is there for the caller. `versions`: of it, those in question."""
    if caller.is_admin:
        return True
    maker = await deps.keys.maker_of(name)
    if maker is not None and maker[0] == FINE_TUNING:
        return maker[1] == caller.owner
    if caller.models is not None:
        return name in caller.models
    is_lost = maker is None and any(alias.startswith(TUNED) for each in versions for alias in each.manifest.aliases)
    return not is_lost


async def may_know(name: str, caller: Caller, backend: Backend, deps: AppDeps) -> bool:
    if name == backend.base.id:
        return may_use_base(caller, backend)
    version = resolved(name, deps.store)
    return version is not None and await may_use(version.name, [version], caller, deps)


def resolved(name: str, store: AdapterStore) -> Version | None:
    try:
        return store.resolve(name)
    except ModelNotFound:
        return None
