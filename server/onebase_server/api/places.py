"""Where versions are in memory, as the engine says just now. Those that it has never heard of are on disk."""

import asyncio
from collections.abc import Mapping

from onebase_server.api.deps import AppDeps
from onebase_server.api.schemas_models import Residency
from onebase_server.engine.residence import AdapterStatus, Place

NEAREST: Mapping[Place, Residency] = {
    Place.DISK: "disk",
    Place.LOADING: "disk",
    Place.HOST: "host",
    Place.COPYING: "host",
    Place.SLOT: "device",
}
"""A version that is on its way counts as where it still is."""


async def residency(deps: AppDeps) -> Mapping[str, AdapterStatus]:
    """By digest."""
    if not deps.backend.ready:
        return {}
    statuses = await asyncio.wrap_future(deps.backend.get().engine.adapters())
    return {status.ref.digest: status for status in statuses}


def nearest(digest: str, places: Mapping[str, AdapterStatus]) -> Residency:
    """The one word that `/v1/models` says."""
    return NEAREST[places[digest].place] if digest in places else "disk"
