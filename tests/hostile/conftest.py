"""One server in process for the fuzzers."""

from collections.abc import Iterator
from typing import Any

import pytest

from api_world import World, open_world


@pytest.fixture(scope="session")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    """With a key, sent along by itself: a fuzzer that makes one must not lock itself out."""
    key = "sk-admin-key-1"
    with open_world(tmp_path_factory.mktemp("fuzzed"), loop, settings={"admin_key": key}) as world:
        world.headers = {"Authorization": f"Bearer {key}"}
        world.publish("pirate")
        yield world
