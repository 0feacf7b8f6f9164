"""A server in process for each test to break."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_world import World, open_world


@pytest.fixture
def world(tmp_path: Path, loop: Any) -> Iterator[World]:
    """A server of the test's own: it is going to be broken."""
    with open_world(tmp_path, loop) as world:
        world.publish("pirate")
        world.publish("support")
        yield world
