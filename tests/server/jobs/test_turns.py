"""Whose turn it is: by priority, then by the order in which jobs were made, whichever data are checked first."""

import threading
from pathlib import Path
from typing import Any

import pytest

from jobs_world import JobsWorld, jobs_world
from onebase_server.jobs import validate as validation
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.supervisor import KEEPS_TURN_S
from onebase_server.records.tables import JobRow

pytestmark = pytest.mark.anyio


class Checks:
    """The check of the job `held` ends only after `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = ""
        self._released = threading.Event()
        self._check = validation.check_files
        monkeypatch.setattr(validation, "check_files", self._held_back)

    def release(self) -> None:
        self._released.set()

    def _held_back(self, job: JobRow, folder: RunFolder, go_on: Any) -> Any:
        while job.id == self.held and not self._released.wait(0.01):
            go_on(None)
        return self._check(job, folder, go_on)


def stop_clock(world: JobsWorld, monkeypatch: pytest.MonkeyPatch, ahead_s: float = 0.0) -> None:
    """A job keeps its turn for a time only: the machine's own must not pass meanwhile."""
    now = world.ledger.now() + ahead_s
    monkeypatch.setattr(world.ledger, "_now", lambda: now)


async def two_jobs(world: JobsWorld, checks: Checks, dataset: Path) -> tuple[JobRow, JobRow]:
    """The first one's data are still being checked when the second one's have been."""
    first = await world.retrain(dataset=dataset)
    second = await world.retrain(dataset=dataset)
    checks.held = first.id
    await world.supervisor.start()
    return first, second


def started_at(world: JobsWorld, job: JobRow) -> int:
    return (world.folder(job).path / "starts").stat().st_mtime_ns


async def test_a_job_keeps_its_turn_while_its_data_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(monkeypatch)
    async with jobs_world(tmp_path, start=False) as world:
        stop_clock(world, monkeypatch)
        first, second = await two_jobs(world, checks, tmp_path)
        try:
            second = await world.until(second, lambda job: job.state == "queued")
            for _ in range(5):  # rounds in which it would be begun
                await world.ledger.news.wait(0.05)
            assert (await world.ledger.get(second.id)).state == "queued"
            checks.release()
            first, second = await world.ended(first), await world.ended(second)
            assert started_at(world, first) < started_at(world, second)
        finally:
            await world.supervisor.stop()


async def test_a_check_that_takes_long_holds_nobody_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(monkeypatch)
    async with jobs_world(tmp_path, start=False) as world:
        stop_clock(world, monkeypatch)
        first, second = await two_jobs(world, checks, tmp_path)
        stop_clock(world, monkeypatch, KEEPS_TURN_S)
        try:
            assert (await world.ended(second)).state == "succeeded"
            assert (await world.ledger.get(first.id)).state == "validating_files"
            checks.release()
            assert (await world.ended(first)).state == "succeeded"
        finally:
            await world.supervisor.stop()


@pytest.mark.slow
async def test_one_job_trains_at_a_time_the_most_urgent_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        stop_clock(world, monkeypatch)
        jobs = [await world.retrain(dataset=tmp_path, priority=priority) for priority in (0, 0, 5)]
        await world.supervisor.start()
        try:
            ended = [await world.ended(job) for job in jobs]
            starts = [started_at(world, job) for job in ended]
            assert starts[2] < starts[0] < starts[1]
        finally:
            await world.supervisor.stop()
