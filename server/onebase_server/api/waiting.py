"""Waiting for an answer while its client is watched: one that hangs up is not generated for any longer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from litestar.types import Receive

T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed the connection: there is nobody to answer."""


async def unless_client_leaves(receive: Receive, work: Awaitable[T], cancel: Callable[[], None]) -> T:
    """Await `work`; call `cancel` however it ends but well. Raises ClientLeft when the client hangs up first.

    The request's body must have been read: the next message is then the disconnect.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientLeft
        return worker.result()
    finally:
        watcher.cancel()
        if not worker.done() or worker.cancelled() or worker.exception() is not None:
            worker.cancel()
            cancel()


async def disconnected(receive: Receive) -> None:
    """Until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
