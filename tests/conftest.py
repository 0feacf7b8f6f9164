"""What tests of every folder share. Imports nothing that costs time."""

import asyncio
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FAST = "not slow and not gpu"
MODULE_MARKS = re.compile(r"^pytestmark = (\[[^\]]*\]|.*)$", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast run would deselect a module that is slow as a whole only after importing it, and torch with it."""
    if config.option.markexpr != FAST or collection_path.suffix != ".py":
        return None
    if collection_path.parent.name == "gpu":
        return True
    marks = MODULE_MARKS.search(collection_path.read_text("utf-8"))
    return True if marks and re.search(r"mark\.(slow|gpu)\b", marks[1]) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In several processes (`--dist loadgroup`) a file's tests stay together, for what they start is for all of them.
    Files that name a group of their own are first, and one after the other: a training job stands still for as long as
    another test's requests keep the processor busy."""
    named = [item for item in items if item.get_closest_marker("xdist_group")]
    others = [item for item in items if not item.get_closest_marker("xdist_group")]
    for item in others:
        item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))
    items[:] = named + others


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One event loop for all servers in process: `World.request` runs it. Whatever they started must have ended."""
    loop = asyncio.new_event_loop()
    yield loop
    left = asyncio.all_tasks(loop)
    loop.close()
    assert not left, left
