"""Fixtures of the jobs tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobs_world import JobsWorld, jobs_world


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def world(tmp_path: Path, anyio_backend: str) -> AsyncIterator[JobsWorld]:
    async with jobs_world(tmp_path) as world:
        yield world
