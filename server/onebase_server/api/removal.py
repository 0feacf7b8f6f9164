"""Deleting models: who may, what forbids it, and the files' end once the last request on them is over."""

import asyncio
import logging
import threading
from collections.abc import Iterable
from typing import Any

from litestar import Request

from onebase.errors import BaseModelError, Conflict, EngineError, Forbidden, ModelNotFound, NotReady, OnebaseError
from onebase.store import AdapterStore, Version
from onebase.store_read import is_alias
from onebase_server.api.auth import check_admin_place
from onebase_server.api.caller import LOCAL, caller_of
from onebase_server.api.deps import AppDeps
from onebase_server.api.models_lookup import to_ref
from onebase_server.engine.engine import Engine
from onebase_server.engine.types import AdapterRef
from onebase_server.jobs.states import FINE_TUNING, UNFINISHED
from onebase_server.records.overview import jobs_on

logger = logging.getLogger(__name__)


async def check_may_delete(version: Version, request: Request[Any, Any, Any], deps: AppDeps) -> None:
    """The key whose fine-tuning job made the adapter may, and an admin. Raises Forbidden."""
    caller = caller_of(request)
    if await deps.keys.maker_of(version.name, anew=True) == (FINE_TUNING, caller.owner):
        return
    if not caller.is_admin:
        raise Forbidden(f"This key may not delete `{version.name}`: only the key whose job trained it, and an admin's.")
    if caller is LOCAL:
        check_admin_place(request)


async def check_no_job(model: str, version: Version, deps: AppDeps) -> None:
    """Raises Conflict while a job is to publish under the name that goes: it would come back, or the job fail."""
    for job in await jobs_on(deps.durable.database, version.name, UNFINISHED):
        if model in (version.name, job.fine_tuned_model) or job.version == version.id:
            raise Conflict(f"The job {job.id} is to publish `{version.name}`: cancel it, or wait for its end.")


def remove_when_unused(model: str, version: Version, engine: Engine, store: AdapterStore) -> None:
    """Take the name away now, slots and files when the last request that holds them has ended. `version`: what `model`
    means. Raises Conflict for a version that a name serves, unless it is an alias that is deleted."""
    entry = None if is_alias(model) or "@" in model else store.get(model)
    readable = {each.version: each for each in (entry.versions if entry else (version,))}
    try:
        withdrawn = store.withdraw(model, force=is_alias(model))
    except Conflict as error:  # the store's own words tell of the command line's way
        raise Conflict(
            f"`{version.name}` serves {version.id}: serve another version first (roll back, or publish one), or delete "
            f"`{version.name}` as a whole."
        ) from error
    for name, number in withdrawn:
        if number in readable:
            discard_after(readable[number], engine, store)
        else:  # damaged: nobody can be reading it
            store.discard(name, number)


def discard_after(version: Version, engine: Engine, store: AdapterStore) -> None:
    try:
        unloaded = engine.unload(to_ref(version), forget=True)
    except (EngineError, NotReady):  # it has died or is going down, and its memory with it
        store.discard(version.name, version.version)
        return

    def discard() -> None:
        store.discard(version.name, version.version, wait=True)

    def begin(_: object) -> None:
        # called on the engine's thread, which must wait neither for a disk nor for those who hold the files
        threading.Thread(target=discard, name="onebase-discard", daemon=True).start()

    unloaded.add_done_callback(begin)


async def let_go_of_removed(deps: AppDeps) -> None:
    """Free the memory of versions that another process (`onebase adapters rm`) has removed from the store, once the
    last request that holds them has ended. Their files are the store's `sweep`'s."""
    try:
        engine = deps.backend.get().engine
        # in this order: what the engine knows was in the store, so what is not there now has been removed
        known = [status.ref for status in await asyncio.wrap_future(engine.adapters())]
        for ref in await asyncio.to_thread(removed, known, deps.store):
            engine.unload(ref, forget=True)
            logger.info("%s was removed from the store: its memory is freed when no request uses it", ref.id)
    except (EngineError, NotReady, BaseModelError):  # not loaded, or at its end: it holds nothing for long
        return


def removed(refs: Iterable[AdapterRef], store: AdapterStore) -> list[AdapterRef]:
    """Those whose versions are not in the store any more. One that can't be read just now still is."""
    gone = []
    for ref in refs:
        try:
            store.resolve(ref.id)
        except ModelNotFound:
            gone.append(ref)
        except (OSError, OnebaseError) as error:
            logger.warning("%s can't be looked up in the store: %s", ref.id, error)
    return gone
