"""One event loop for all, and a server in process for each test to break."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_world import World, open_world


async def end_tasks() -> None:
    """sse-starlette leaves a task that waits for the server's end."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(end_tasks())
    loop.close()


@pytest.fixture
def world(tmp_path: Path, loop: Any) -> Iterator[World]:
    """A server of the test's own: it is going to be broken."""
    with open_world(tmp_path, loop) as world:
        world.publish("pirate")
        world.publish("support")
        yield world
