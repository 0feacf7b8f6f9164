"""Brings versions near before a name moves to them: whoever asks for the name first finds them in memory.

It is also the last check: a version that the engine can't load is never served under a name.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from onebase.errors import AdapterInvalid, OnebaseError
from onebase.store import Version
from onebase_server.api.deps import AppDeps
from onebase_server.api.models_lookup import to_ref

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 30.0


async def bring_near(versions: Iterable[Version], deps: AppDeps) -> None:
    """Answers when all are loaded; at once while there is no engine to load them. Raises what the engine says of one
    that can't be served. A load that takes longer than `PATIENCE_S` goes on by itself.
    """
    if not deps.backend.ready:
        return
    engine = deps.backend.get().engine
    loads = [(version, asyncio.wrap_future(engine.preload(to_ref(version)))) for version in versions]
    for version, load in loads:
        try:
            await asyncio.wait_for(load, PATIENCE_S)
        except TimeoutError:
            logger.warning("%s is not loaded yet; its first request may have to wait", version.id)
        except OSError as error:
            raise AdapterInvalid(str(version.path), [f"it can't be read: {error}"]) from error
        except OnebaseError:
            if deps.backend.ready:  # else the engine ends, which says nothing of the version
                raise
