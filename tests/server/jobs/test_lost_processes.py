"""Trainers that crash, hang, are cancelled or paused, and servers that go away: no job is lost, and none runs twice."""

import asyncio
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from jobs_world import FAST, JobsWorld, jobs_world
from onebase.errors import InvalidInput, ModelNotFound
from onebase_server.jobs.process import Silence, holders
from onebase_server.jobs.supervisor import Supervisor
from onebase_server.jobs.watch import RunTimes
from onebase_server.records.jobs import JobRecords
from onebase_server.records.tables import JobRow

pytestmark = pytest.mark.anyio


def nothing_published(world: JobsWorld, job: JobRow) -> bool:
    try:
        world.store.resolve(job.fine_tuned_model or "")
    except ModelNotFound:
        return True
    return False


async def training(world: JobsWorld, job: JobRow, step: int = 1) -> JobRow:
    return await world.until(job, lambda row: row.state == "running" and row.step >= step)


@pytest.mark.slow
async def test_a_crashed_trainer_goes_on_from_its_checkpoint(world: JobsWorld) -> None:
    world.script(steps=4, every=1, ends=["crash", "succeed"])
    job = await world.ended(await world.fine_tune())
    assert (job.state, job.attempt, world.starts(job)) == ("succeeded", 2, ["train", "train"])
    steps = [event.data["step"] for event in await world.told(job) if event.type == "metrics" and event.data]
    assert steps == [1, 2, 3, 4]
    warnings = [event.message for event in await world.told(job) if event.level == "warn"]
    assert warnings == ["The training process was killed by signal 9 (out of memory?); the job goes back to the queue"]


@pytest.mark.slow
async def test_a_trainer_that_lost_the_server_of_its_base_goes_on_from_its_checkpoint(world: JobsWorld) -> None:
    world.script(steps=4, every=1, ends=["server gone", "succeed"])
    job = await world.ended(await world.fine_tune())
    assert (job.state, job.attempt) == ("succeeded", 2)
    steps = [event.data["step"] for event in await world.told(job) if event.type == "metrics" and event.data]
    assert steps[-1] == 4


@pytest.mark.slow
async def test_a_job_that_gets_on_between_crashes_is_never_given_up(world: JobsWorld) -> None:
    crashes = FAST.max_losses + 2
    world.script(steps=8, every=1, ends=["crash early"] * crashes + ["succeed"])
    job = await world.ended(await world.fine_tune())
    assert (job.state, job.attempt) == ("succeeded", crashes + 1)


@pytest.mark.slow
async def test_a_trainer_that_always_crashes_fails_its_job_and_the_next_job_runs(world: JobsWorld) -> None:
    world.script(steps=2, every=5, ends=["crash"])
    job = await world.ended(await world.fine_tune())
    assert job.error is not None
    assert (job.state, job.error["code"], job.attempt) == ("failed", "trainer_died", FAST.max_losses)
    assert "killed by signal 9" in job.error["message"]
    assert "lower hyperparameters.tokens_at_once" in job.error["message"]
    assert str(world.home.root) not in job.error["message"]
    world.script()
    assert (await world.ended(await world.fine_tune())).state == "succeeded"


@pytest.mark.slow
async def test_what_the_trainer_says_is_the_jobs_error(world: JobsWorld) -> None:
    world.script(ends=["fail"])
    job = await world.ended(await world.fine_tune())
    assert job.error == {"code": "training_failed", "message": "the loss is not finite", "param": None}
    assert nothing_published(world, job)
    assert not world.folder(job).work.exists()


@pytest.mark.slow
async def test_a_silent_trainer_is_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with jobs_world(tmp_path, times=RunTimes(poll_s=0.01, stall_s=0.2, max_losses=2)) as world:
        world.script(steps=2, every=1, ends=["hang", "succeed"])
        job = await world.fine_tune()
        counted = Silence.seconds

        def seconds(silence: Silence, sign: float) -> float:
            """Of the first attempt where it hangs: how long one takes to start is the machine's affair."""
            hangs = world.folder(job).read_status().step == 1 and world.starts(job) == ["train"]
            return counted(silence, sign) if hangs else 0.0

        monkeypatch.setattr(Silence, "seconds", seconds)
        job = await world.ended(job)
    assert (job.state, job.attempt) == ("succeeded", 2)


def test_silence_is_counted_while_the_machine_is_awake_and_any_sign_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("onebase_server.jobs.process.time.monotonic", lambda: now)
    silence = Silence()
    assert silence.seconds(5.0) == 0
    now = 160.0  # whatever the wall clock says: it may have been set, or have gone on while the machine slept
    assert silence.seconds(5.0) == 60
    assert silence.seconds(4.0) == 0, "written by a clock that has been set back"
    now = 170.0
    assert silence.seconds(4.0) == 10


@pytest.mark.parametrize(
    "deaf", [pytest.param(False, marks=pytest.mark.slow, id="clean"), pytest.param(True, id="deaf to SIGTERM")]
)
async def test_cancelling_ends_the_process_and_publishes_nothing(world: JobsWorld, deaf: bool) -> None:
    world.script(holds=1, deaf=deaf)
    job = await training(world, await world.fine_tune())
    assert len(holders(world.folder(job))) == 1
    job = await world.jobs.cancel(job.id, "ann")
    assert job.state == "cancelled"
    job = await world.ended(job)
    assert holders(world.folder(job)) == []
    assert nothing_published(world, job)
    with pytest.raises(InvalidInput, match="is cancelled"):
        await world.jobs.cancel(job.id, "ann")


@pytest.mark.slow
async def test_a_waiting_job_is_cancelled_without_a_process(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        assert (await world.jobs.cancel(job.id, "ann")).state == "cancelled"
    async with jobs_world(tmp_path) as world:
        other = await world.ended(await world.fine_tune())
        assert other.state == "succeeded"
        assert world.starts(job) == []


@pytest.mark.slow
async def test_a_paused_job_frees_its_process_and_goes_on_where_it_was(world: JobsWorld) -> None:
    world.script(steps=6, every=1, holds=3)
    job = await training(world, await world.fine_tune(), step=3)
    assert (await world.jobs.pause(job.id, "ann")).state == "paused"
    job = await world.until(job, lambda row: not row.run_open)
    assert holders(world.folder(job)) == []
    with pytest.raises(InvalidInput, match="can't be paused"):
        await world.jobs.pause(job.id, "ann")
    world.script(steps=6, every=1)
    assert (await world.jobs.resume(job.id, "ann")).state == "queued"
    job = await world.ended(job)
    steps = [event.data["step"] for event in await world.told(job) if event.type == "metrics" and event.data]
    assert (job.state, len(steps)) == ("succeeded", len(set(steps)))


async def test_a_new_server_takes_up_a_living_trainer(tmp_path: Path) -> None:
    async with jobs_world(tmp_path) as world:
        world.script(holds=1)
        job = await training(world, await world.fine_tune())
    async with jobs_world(tmp_path) as world:
        assert len(holders(world.folder(job))) == 1
        world.let_go()
        job = await world.ended(job)
        assert (job.state, job.attempt, world.starts(job)) == ("succeeded", 1, ["train"])


@pytest.mark.slow
async def test_a_new_server_can_cancel_the_trainer_that_it_took_up(tmp_path: Path) -> None:
    async with jobs_world(tmp_path) as world:
        world.script(holds=1, deaf=True)
        job = await training(world, await world.fine_tune())
    async with jobs_world(tmp_path) as world:
        await world.jobs.cancel(job.id, None)
        job = await world.ended(job)
        assert holders(world.folder(job)) == []


@pytest.mark.slow
async def test_what_ended_while_no_server_ran_is_settled_by_the_next(tmp_path: Path) -> None:
    async with jobs_world(tmp_path) as world:
        world.script(steps=4, every=1, holds=1)
        good = await training(world, await world.fine_tune())
    world.let_go()
    wait_until_gone(world, good)
    async with jobs_world(tmp_path) as world:
        good = await world.ended(good)
        assert (good.state, world.starts(good)) == ("succeeded", ["train"])
        world.script(steps=4, every=1, holds=2)
        lost = await training(world, await world.fine_tune(), step=2)
    [trainer] = holders(world.folder(lost))
    os.kill(trainer.pid, signal.SIGKILL)
    wait_until_gone(world, lost)
    async with jobs_world(tmp_path) as world:
        world.script(steps=5, every=1)
        lost = await world.ended(lost)
        assert (lost.state, lost.attempt) == ("succeeded", 2)


def wait_until_gone(world: JobsWorld, job: JobRow) -> None:
    while world.folder(job).is_alive():
        os.sched_yield()


@pytest.mark.slow
async def test_of_two_servers_on_one_home_one_supervises(tmp_path: Path) -> None:
    async with jobs_world(tmp_path) as first, jobs_world(tmp_path) as second:
        first.script(steps=3)
        jobs = [await world.fine_tune() for world in (first, second)]
        for job in jobs:
            ended = await second.ended(job)
            assert (ended.state, second.starts(ended)) == ("succeeded", ["train"])


async def test_each_of_two_servers_lets_go_of_what_was_removed(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, start=False) as first, jobs_world(tmp_path, start=False) as second:
        told = [asyncio.Event(), asyncio.Event()]

        async def note(number: int) -> None:
            told[number].set()

        for number, world in enumerate((first, second)):
            world.supervisor.let_go = partial(note, number)
            await world.supervisor.start()
        for event in told:
            await asyncio.wait_for(event.wait(), 60)  # both are told within a round, or never
        for world in (first, second):
            await world.supervisor.stop()


async def test_a_server_that_stops_in_the_middle_of_a_round_leaves_no_task_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One begun after the count would go on over a database that is being closed."""
    async with jobs_world(tmp_path, start=False) as world:
        await world.fine_tune()
        in_states, looked = JobRecords.in_states, asyncio.Event()

        async def slowly(records: JobRecords, states: tuple[str, ...]) -> Sequence[JobRow]:
            rows = await in_states(records, states)
            looked.set()
            await asyncio.sleep(0.02)
            return rows

        async def validate(_supervisor: Supervisor, _job: JobRow) -> None:
            await asyncio.sleep(0.2)

        monkeypatch.setattr(JobRecords, "in_states", slowly)
        monkeypatch.setattr(Supervisor, "_validate", validate)
        await world.supervisor.start()
        await looked.wait()
        await world.supervisor.stop()
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("job ")] == []
