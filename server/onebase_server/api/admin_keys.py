"""`/admin/keys`: make, list and revoke API keys. A running server sees each change within half a second."""

import time
from typing import Any

from litestar import Request, delete, get, post
from litestar.params import FromPath, JSONBody

from onebase.errors import NotFound
from onebase_server.api.audit import tell_target
from onebase_server.api.caller import KeyLimits
from onebase_server.api.deps import Deps
from onebase_server.api.keys import KeyOrder, new_key
from onebase_server.api.schemas_keys import CreatedKey, CreateKey, KeyList, KeyObject, created_key, key_object


@post("/keys", operation_id="createKey", status_code=200, tags=["Admin"])
async def create_key(data: JSONBody[CreateKey], request: Request[Any, Any, Any], deps: Deps) -> CreatedKey:
    """Make a key. It is in this answer and nowhere else."""
    row, key = new_key(order_of(data), int(time.time()))
    reply = created_key(row, key)
    await deps.keys.add(row)
    tell_target(request, f"{row.id} ({', '.join(row.scopes)}) of {row.owner}")
    return reply


@get("/keys", operation_id="listKeys", tags=["Admin"])
async def list_keys(deps: Deps) -> KeyList:
    """Every key that was ever made, oldest first."""
    return KeyList(object="list", data=[key_object(row) for row in await deps.keys.list()])


@delete("/keys/{key_id:str}", operation_id="revokeKey", status_code=200, tags=["Admin"])
async def revoke_key(key_id: FromPath[str], deps: Deps) -> KeyObject:
    """Revoke a key for good; what runs on it finishes. Its row stays, for who made what."""
    row = await deps.keys.revoke(key_id, int(time.time()))
    if row is None:
        raise NotFound(f"No such key: {key_id}", param="id")
    return key_object(row)


def order_of(data: CreateKey) -> KeyOrder:
    return KeyOrder(
        name=data.name,
        scopes=tuple(data.scopes),
        owner=data.owner,
        models=None if data.models is None else tuple(data.models),
        limits=KeyLimits(data.rpm, data.tpm, data.parallel),
        expires_in=data.expires_in,
    )
