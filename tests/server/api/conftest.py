"""One event loop and one server for all API tests: they differ in what they ask, not in what is there."""

import asyncio
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("world"), loop) as world:
        world.publish("pirate")
        world.publish("pirate")
        world.publish("support")
        yield world


@pytest.fixture
def world(shared_world: World) -> World:
    """The shared server, saying its usual words."""
    shared_world.says = "Hello there."
    return shared_world


@pytest.fixture
def own_world(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    """A server of the test's own, to change its store or break it."""
    with open_world(tmp_path_factory.mktemp("own"), loop) as world:
        yield world
