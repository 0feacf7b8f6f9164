"""Pause, resume and cancel: at every state, two at once, and while a process is busy with the one before."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Final

import pytest

from jobs_world import JobsWorld, jobs_world
from onebase.errors import InvalidInput
from onebase_server.jobs.process import holders
from onebase_server.jobs.settle import Settler
from onebase_server.jobs.watch import RunTimes
from onebase_server.records.tables import JobRow

pytestmark = pytest.mark.anyio

COMMANDS: Final = ("pause", "resume", "cancel")
# What each command makes of a state; where it is missing, the command is refused and nothing changes.
RULES: Final = {
    ("validating_files", "cancel"): "cancelled",
    ("queued", "pause"): "paused",
    ("queued", "cancel"): "cancelled",
    ("running", "pause"): "paused",
    ("running", "cancel"): "cancelled",
    ("paused", "resume"): "queued",
    ("paused", "cancel"): "cancelled",
}
STATES: Final = (
    "validating_files", "queued", "running", "publishing", "paused", "succeeded", "failed", "cancelled",
)  # fmt: skip
DECIDED: Final = {"hyperparameters": {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1}}
SLOW_SAVE: Final = RunTimes(poll_s=0.01, cancel_grace_s=0.3, pause_grace_s=600.0)


async def put_into(world: JobsWorld, job: JobRow, state: str, **values: object) -> None:
    before = await world.ledger.get(job.id)
    assert await world.ledger.change(job.id, {"state": state, **values}, when=(before.state,)) is not None


async def told_to(world: JobsWorld, job: JobRow, command: str) -> bool:
    """False: it was refused."""
    try:
        await getattr(world.jobs, command)(job.id, "ann")
    except InvalidInput:
        return False
    return True


def in_turn(state: str, commands: tuple[str, ...]) -> tuple[str, tuple[bool, ...]]:
    """The state that the rules lead to, and which of the commands were obeyed."""
    obeyed = []
    for command in commands:
        obeyed.append((state, command) in RULES)
        state = RULES.get((state, command), state)
    return state, tuple(obeyed)


@pytest.mark.parametrize("state", STATES)
async def test_two_commands_at_once_are_as_one_after_the_other(tmp_path: Path, state: str) -> None:
    async with jobs_world(tmp_path, start=False, waiting=100) as world:
        file_id = (await world.upload()).id
        for first in COMMANDS:
            for second in COMMANDS:
                job = await world.fine_tune(training_file=file_id)
                await put_into(world, job, state)
                one, two = await asyncio.gather(told_to(world, job, first), told_to(world, job, second))
                found = (await world.ledger.get(job.id)).state, (one, two)
                there, (two_last, one_first) = in_turn(state, (second, first))
                possible = [in_turn(state, (first, second)), (there, (one_first, two_last))]
                assert found in possible, (first, second)


async def test_each_pause_is_told_though_two_fall_into_one_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        monkeypatch.setattr(world.ledger, "_now", lambda: 1_000_000.0)
        job = await world.fine_tune()
        await put_into(world, job, "queued")
        commands = ["pause", "resume", "pause", "resume"]
        assert [await told_to(world, job, command) for command in commands] == [True] * 4
        story = [event.message for event in await world.told(job)]
        assert [text.removeprefix("The job has been ") for text in story[-4:]] == ["paused", "resumed"] * 2


@pytest.mark.parametrize(
    ("state", "values", "end"),
    [
        ("validating_files", {}, "succeeded"),
        ("queued", DECIDED, "succeeded"),
        pytest.param("running", {"run_open": True, "attempt": 1, **DECIDED}, "succeeded", marks=pytest.mark.slow),
        ("publishing", {"run_open": True, "attempt": 1, "version": "gone@1"}, "failed"),
        ("paused", {"run_open": True, "attempt": 1}, "paused"),
        ("cancelled", {"run_open": True, "attempt": 1}, "cancelled"),
    ],
)
async def test_a_server_that_starts_takes_up_or_ends_a_job_of_any_state(
    tmp_path: Path, state: str, values: dict[str, object], end: str
) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        await put_into(world, job, state, **values)
        world.folder(job).work.mkdir()
    async with jobs_world(tmp_path) as world:
        job = await world.until(job, lambda row: row.state == end and not row.run_open)
        assert world.folder(job).work.exists() is (end == "paused")
        if end == "failed":
            assert job.error is not None
            assert (job.error["code"], job.version) == ("version_removed", None)
            assert "gone@1 was removed" in job.error["message"]


async def test_a_job_that_can_never_be_carried_out_fails_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        await put_into(world, job, "running", run_open=True)

    def wrong(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Settler, "published", wrong)
    async with jobs_world(tmp_path) as world:
        job = await world.ended(job)
        assert job.error is not None
        assert (job.state, job.error["code"]) == ("failed", "internal_error")


@pytest.mark.slow
@pytest.mark.parametrize("between", [(), ("resume",)], ids=["paused", "resumed"])
async def test_a_cancel_does_not_wait_for_the_checkpoint_of_a_pause(tmp_path: Path, between: tuple[str, ...]) -> None:
    async with jobs_world(tmp_path, times=SLOW_SAVE) as world:
        world.script(every=1000, holds=1, save_s=600)
        job = await world.until(await world.fine_tune(), lambda row: row.step >= 1)
        for command in ("pause", *between):
            await getattr(world.jobs, command)(job.id, "ann")
        while not (world.folder(job).path / "saving").exists():
            await asyncio.sleep(0.01)
        await world.jobs.cancel(job.id, "ann")
        job = await world.ended(job)
        assert (job.state, holders(world.folder(job))) == ("cancelled", [])
        assert world.store.get(job.adapter) is None, "the process had the time to save"


@pytest.mark.slow
async def test_a_pause_that_is_taken_back_at_once_still_saves(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, times=RunTimes(poll_s=0.2)) as world:
        world.script(steps=6, every=1000, holds=3)
        job = await world.until(await world.fine_tune(), lambda row: row.step >= 3)
        await world.jobs.pause(job.id, "ann")
        await world.jobs.resume(job.id, "ann")
        job = await world.until(job, lambda row: row.attempt == 2)
        world.let_go()
        job = await world.ended(job)
        trained = [json.loads(line)["step"] for line in world.folder(job).events.read_text().splitlines()]
        assert (job.state, trained) == ("succeeded", [1, 2, 3, 4, 5, 6]), "no step twice: it saved"
        assert world.starts(job) == ["train", "train"]


@pytest.mark.slow
async def test_a_paused_job_that_is_cancelled_leaves_no_checkpoints_behind(world: JobsWorld) -> None:
    world.script(every=1, holds=2)
    job = await world.until(await world.fine_tune(), lambda row: row.step >= 2)
    await world.jobs.pause(job.id, "ann")
    job = await world.until(job, lambda row: not row.run_open)
    assert world.folder(job).work.exists()
    await world.jobs.cancel(job.id, "ann")
    job = await world.ended(job)
    assert not world.folder(job).work.exists()
    assert not world.folder(job).training.exists()


@pytest.mark.slow
async def test_a_trainer_that_the_machine_ends_is_no_failure(world: JobsWorld) -> None:
    """A service manager sends its SIGTERM to everything that belongs to the server."""
    world.script(steps=3, every=1, holds=2)
    job = await world.until(await world.fine_tune(), lambda row: row.step >= 2)
    [trainer] = holders(world.folder(job))
    os.kill(trainer.pid, signal.SIGTERM)
    job = await world.ended(job)
    assert (job.state, job.attempt) == ("succeeded", 2)
