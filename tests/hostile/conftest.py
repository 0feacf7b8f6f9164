"""One event loop and one server in process for the fuzzers."""

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
def fuzzed(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    """With a key, sent along by itself: a fuzzer that makes one must not lock itself out."""
    key = "sk-admin-key-1"
    with open_world(tmp_path_factory.mktemp("fuzzed"), loop, settings={"admin_key": key}) as world:
        world.headers = {"Authorization": f"Bearer {key}"}
        world.publish("pirate")
        yield world
