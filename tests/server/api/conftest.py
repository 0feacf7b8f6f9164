"""One server for all API tests: they differ in what they ask, not in what is there."""

from collections.abc import Iterator
from typing import Any

import pytest

from api_world import World, obey_masks, open_world


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


@pytest.fixture(scope="module")
def obedient_world(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    """Its model obeys the engine's masks, as a real sampler does."""
    with open_world(tmp_path_factory.mktemp("obedient"), loop) as world:
        obey_masks(world.runner)
        yield world
