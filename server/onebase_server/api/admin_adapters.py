"""`/admin/adapters`: what is published, where it is in memory, and moving names between versions."""

import asyncio
from collections.abc import Mapping
from typing import Any

from litestar import Request, get, post
from litestar.params import FromPath, JSONBody

from onebase.errors import InvalidInput, ModelNotFound
from onebase.store import AdapterStore, Entry, Version
from onebase_server.api.audit import tell_target
from onebase_server.api.deps import AppDeps, Deps
from onebase_server.api.models_lookup import to_ref
from onebase_server.api.preload import bring_near
from onebase_server.api.schemas_admin import (
    AdapterCard,
    AdapterList,
    PublishRequest,
    ServedVersion,
    VersionCard,
    VersionChoice,
)
from onebase_server.engine.residence import AdapterStatus

NO_CHOICE = VersionChoice()


@get("/adapters", operation_id="listAdapters", tags=["Admin"])
async def list_adapters(deps: Deps) -> AdapterList:
    """Every adapter with its versions and their residency."""
    places = await residency(deps)
    return AdapterList(object="list", data=[card_of(entry, places) for entry in deps.store.list()])


@get("/adapters/{name:str}", operation_id="getAdapter", tags=["Admin"])
async def get_adapter(name: FromPath[str], deps: Deps) -> AdapterCard:
    """One adapter."""
    return await show(name, deps)


@post("/adapters/{name:str}/rollback", operation_id="rollbackAdapter", status_code=200, tags=["Admin"])
async def rollback(
    name: FromPath[str], deps: Deps, request: Request[Any, Any, Any], data: JSONBody[VersionChoice] = NO_CHOICE
) -> AdapterCard:
    """Serve what was served before, or the version given. Running requests finish on theirs."""
    entry = entry_of(name, deps.store)
    await bring_near([version for version in entry.versions if version.version == data.version], deps)
    entry = await asyncio.to_thread(deps.store.rollback, name, data.version)
    tell_target(request, ", ".join(f"@{version}" for version in entry.weights))
    return await show(name, deps)


@post("/adapters/{name:str}/publish", operation_id="publishVersion", status_code=200, tags=["Admin"])
async def publish(
    name: FromPath[str], deps: Deps, data: JSONBody[PublishRequest], request: Request[Any, Any, Any]
) -> AdapterCard:
    """Serve one version under the name, or split its traffic between several. They are loaded first."""
    entry = entry_of(name, deps.store)
    shares = shares_of(data)
    await bring_near([version for version in entry.versions if version.version in shares], deps)
    await asyncio.to_thread(deps.store.set_current, name, shares)
    tell_target(request, ", ".join(f"@{version} {share:.0%}" for version, share in shares.items()))
    return await show(name, deps)


@post("/adapters/{name:str}/preload", operation_id="preloadAdapter", status_code=200, tags=["Admin"])
async def preload(name: FromPath[str], deps: Deps, data: JSONBody[VersionChoice] = NO_CHOICE) -> AdapterCard:
    """Bring a version near the device ahead of its first request; answers when it is loaded."""
    await asyncio.wrap_future(deps.backend.get().engine.preload(to_ref(chosen(name, data, deps.store))))
    return await show(name, deps)


@post("/adapters/{name:str}/pin", operation_id="pinAdapter", status_code=200, tags=["Admin"])
async def pin(name: FromPath[str], deps: Deps, data: JSONBody[VersionChoice] = NO_CHOICE) -> AdapterCard:
    """Load a version and keep it: others are evicted first."""
    ref = to_ref(chosen(name, data, deps.store))
    await asyncio.wrap_future(deps.backend.get().engine.preload(ref, pin=True))
    return await show(name, deps)


@post("/adapters/{name:str}/unpin", operation_id="unpinAdapter", status_code=200, tags=["Admin"])
async def unpin(name: FromPath[str], deps: Deps, data: JSONBody[VersionChoice] = NO_CHOICE) -> AdapterCard:
    """Let a version be evicted again."""
    await asyncio.wrap_future(deps.backend.get().engine.unpin(to_ref(chosen(name, data, deps.store))))
    return await show(name, deps)


@post("/adapters/{name:str}/unload", operation_id="unloadAdapter", status_code=200, tags=["Admin"])
async def unload(name: FromPath[str], deps: Deps, data: JSONBody[VersionChoice] = NO_CHOICE) -> AdapterCard:
    """Free a version's memory as soon as its running requests have ended; does not wait for them."""
    deps.backend.get().engine.unload(to_ref(chosen(name, data, deps.store)))
    return await show(name, deps)


async def show(name: str, deps: AppDeps) -> AdapterCard:
    return card_of(entry_of(name, deps.store), await residency(deps))


async def residency(deps: AppDeps) -> Mapping[str, AdapterStatus]:
    """Where versions are, by digest. Those the engine has never heard of are on disk."""
    if not deps.backend.ready:
        return {}
    statuses = await asyncio.wrap_future(deps.backend.get().engine.adapters())
    return {status.ref.digest: status for status in statuses}


def entry_of(name: str, store: AdapterStore) -> Entry:
    entry = store.get(name)
    if entry is None:
        store.resolve(name)  # raises, with near names
        raise ModelNotFound(name)
    return entry


def chosen(name: str, data: VersionChoice, store: AdapterStore) -> Version:
    return store.resolve(name if data.version is None else f"{name}@{data.version}")


def shares_of(data: PublishRequest) -> Mapping[int, float]:
    if (data.version is None) == (data.weights is None):
        raise InvalidInput("give either 'version' or 'weights'", param="version", code="invalid_value")
    if data.version is not None:
        return {data.version: 1.0}
    wrong = [key for key in data.weights or {} if not (key.isascii() and key.isdecimal() and len(key) < 10)]
    if wrong or not data.weights:
        raise InvalidInput("'weights' must hold version numbers and shares", param="weights", code="invalid_value")
    return {int(key): share for key, share in data.weights.items()}


def card_of(entry: Entry, places: Mapping[str, AdapterStatus]) -> AdapterCard:
    return AdapterCard(
        name=entry.name,
        object="adapter",
        current=entry.current.id if entry.current else None,
        serving=[ServedVersion(version=number, share=share) for number, share in sorted(entry.weights.items())],
        versions=[version_card(version, places.get(version.digest)) for version in entry.versions],
        aliases=dict(entry.aliases),
    )


def version_card(version: Version, status: AdapterStatus | None) -> VersionCard:
    return VersionCard(
        id=version.id,
        version=version.version,
        created_at=version.created_at,
        prompt_format=version.prompt_format,
        digest=version.digest,
        place=status.place.value if status else "disk",
        leases=status.leases if status else 0,
        running=status.running if status else 0,
        pinned=bool(status and status.pinned),
        host_bytes=status.host_bytes if status else 0,
        hits=status.hits if status else 0,
        misses=status.misses if status else 0,
        loads=status.loads if status else 0,
        load_s=status.load_s if status else None,
        last_used=status.last_used if status else None,
        error=status.error if status else None,
        metrics=dict(version.metrics),
    )
