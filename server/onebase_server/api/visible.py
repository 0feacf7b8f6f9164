"""Which models a caller may know of: the one place that decides it. Others are as good as not there.

An adapter that a key's job trained is its owner's. All others are everyone's, unless the key has a list of models. One
whose name says that a job trained it, while no record tells whose job, is shown to nobody but admins.
"""

import difflib
from collections.abc import Iterable

from onebase.errors import ModelNotFound
from onebase.store import Version
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
    except ModelNotFound:
        version = None
    if version is None or not await may_use(version.name, [version], caller, deps):
        # the same names are offered whether there is such a model or not: the answer must not tell
        names = await visible_names(caller, backend, deps)
        raise ModelNotFound(model, difflib.get_close_matches(model, names, n=3))
    return version


async def visible_names(caller: Caller, backend: Backend, deps: AppDeps) -> list[str]:
    names = [backend.base.id] if may_use_base(caller, backend) else []
    for entry in deps.store.list():
        if await may_use(entry.name, entry.versions, caller, deps):
            names += [entry.name, *entry.aliases]
    return names


def may_use_base(caller: Caller, backend: Backend) -> bool:
    return caller.is_admin or caller.models is None or backend.base.id in caller.models


async def may_use(name: str, versions: Iterable[Version], caller: Caller, deps: AppDeps) -> bool:
    """Whether the adapter is there for the caller. `versions`: of it, those in question."""
    if caller.is_admin:
        return True
    is_tuned = any(alias.startswith(TUNED) for each in versions for alias in each.aliases)
    maker = await deps.keys.maker_of(name, anew=is_tuned)
    if maker is not None and maker[0] == FINE_TUNING:
        return maker[1] == caller.owner
    if caller.models is not None:
        return name in caller.models
    return maker is not None or not is_tuned
