"""How much disk a key may fill with files and trained adapters. None set: no limit; a full disk is told by the disk."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from onebase.errors import Forbidden
from onebase_server.api.caller import Caller
from onebase_server.api.deps import AppDeps
from onebase_server.api.upload_rooms import Room
from onebase_server.jobs.states import FINE_TUNING
from onebase_server.records.overview import adapters_of, file_bytes_of

MB = 1_000_000
CODE = "storage_quota_exceeded"


@asynccontextmanager
async def room_for_file(owner: str, deps: AppDeps) -> AsyncIterator[Room | None]:
    """What the owner's next file may take, while it is being uploaded; None: no limit of its own. Raises Forbidden, at
    once or from `Room.take`: the caller may do this again when it has deleted something."""
    quota = deps.settings.file_quota_mb
    if quota is None:
        yield None
        return

    def refuse(left: int) -> Forbidden:
        return Forbidden(
            f"The file is larger than the {left} bytes that are left of the {quota} MB that this key may keep, uploads "
            "under way counted: delete some first.",
            code=CODE,
        )

    stored = await file_bytes_of(deps.durable.database, owner)
    with deps.uploads.open(owner, stored, quota * MB, refuse) as room:
        if stored >= quota * MB:
            raise refuse(0)
        yield room


async def check_adapter_quota(caller: Caller, deps: AppDeps) -> None:
    """Raises Forbidden if what the caller's jobs have trained fills its quota. A running job may still overstep it."""
    quota = deps.settings.adapter_quota_mb
    if quota is None:
        return
    names = await adapters_of(deps.durable.database, caller.owner, FINE_TUNING)
    folders = [version.path for name in names if (entry := deps.store.get(name)) for version in entry.versions]
    used = await asyncio.to_thread(bytes_in, folders)
    if used >= quota * MB:
        raise Forbidden(
            f"Adapters that this key has trained fill its {quota} MB ({used / MB:.1f} MB in {len(folders)} versions): "
            "ask an admin to delete some.",
            code=CODE,
        )


def bytes_in(folders: Iterable[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())
