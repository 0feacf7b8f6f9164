"""Checkpoints: what is listed can be called, whatever happens to the job, the disk or the server meanwhile."""

import asyncio
import errno
from pathlib import Path

import pytest

import fake_trainer
from jobs_world import JobsWorld, jobs_world
from onebase.errors import ModelNotFound
from onebase.manifest import BaseIdentity
from onebase_server.jobs.checkpoints import Checkpoints
from onebase_server.jobs.names import checkpoint_name
from onebase_server.jobs.process import holders
from onebase_server.jobs.progress import Reporter
from onebase_server.jobs.run_folder import RunFolder, TrainerStatus
from onebase_server.records.tables import JobRow
from scripted_base import SCRIPTED_BASE

pytestmark = pytest.mark.anyio


def reporter_of(world: JobsWorld, job: JobRow, known: dict[int, str] | None = None) -> Reporter:
    folder = world.folder(job)
    checkpoints = Checkpoints(job, folder, world.store, lambda _: SCRIPTED_BASE, known or {})
    return Reporter(job, folder, world.ledger, checkpoints)


async def listed(world: JobsWorld, job: JobRow) -> dict[str, str]:
    points = await world.jobs.checkpoints(job.id, None, after=None, limit=10)
    return {point.model: point.version for point in points.rows}


@pytest.mark.parametrize("state", ["running", "paused", "queued", "cancelled"])
async def test_what_is_listed_is_what_the_store_has_whatever_became_of_the_job(tmp_path: Path, state: str) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        await world.ledger.change(job.id, {"state": "running"}, when=("validating_files",))
        reporter = reporter_of(world, job)
        for step in (1, 2, 3):
            fake_trainer.checkpoint(world.folder(job).work, step)
        await reporter.tick()
        assert len(await listed(world, job)) == 3
        await world.ledger.change(job.id, {"state": state}, when=("running",))
        fake_trainer.checkpoint(world.folder(job).work, 4)
        await reporter.tick()
        assert await listed(world, job) == world.store.aliases()
        assert [name.rpartition("-")[2] for name in await listed(world, job)] == ["4", "3", "2"]


async def test_a_checkpoint_that_is_saved_while_news_are_read_has_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        await world.ledger.change(job.id, {"state": "running"}, when=("validating_files",))
        reporter, read_status = reporter_of(world, job), RunFolder.read_status

        def step_meanwhile(folder: RunFolder) -> TrainerStatus:
            folder.events.write_text('{"type": "metrics", "step": 1, "total_steps": 2, "train_loss": 2.0}\n')
            fake_trainer.checkpoint(folder.work, 1)
            return read_status(folder)

        monkeypatch.setattr(RunFolder, "read_status", step_meanwhile)
        for _ in range(2):
            await reporter.tick()
        points = await world.jobs.checkpoints(job.id, None, after=None, limit=10)
        assert [point.metrics for point in points.rows] == [{"step": 1.0, "train_loss": 2.0}]


async def test_what_a_crash_left_in_the_store_without_a_record_is_removed(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        source = fake_trainer.lora_folder(tmp_path / "left", 1.0)
        base = BaseIdentity(id="tiny/base", revision="1", config_hash="0" * 32, quantization="nf4-dq64")
        for alias in (checkpoint_name(job.fine_tuned_model or "", 1), job.fine_tuned_model or ""):
            world.store.publish(source, job.adapter, base=base, aliases=[alias], make_current=False)
        await reporter_of(world, job).tick()
        assert list(world.store.aliases()) == [job.fine_tuned_model]


async def test_a_report_that_fails_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        await world.ledger.change(job.id, {"state": "running"}, when=("validating_files",))
        reporter, change = reporter_of(world, job), world.ledger.change
        events = world.folder(job).events
        events.write_text('{"type": "metrics", "step": 1, "total_steps": 2, "train_loss": 2.0}\n')
        fake_trainer.checkpoint(world.folder(job).work, 1)

        async def no_room(*_args: object, **_named: object) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(world.ledger, "change", no_room)
        with pytest.raises(OSError, match="no space left"):
            await reporter.tick()
        monkeypatch.setattr(world.ledger, "change", change)
        await reporter.tick()
        told = [event.message for event in await world.told(job)]
        assert told[-2:] == [
            "Step 1/2: training loss=2.00",
            f"Checkpoint created at step 1 with Snapshot ID: {job.fine_tuned_model}:ckpt-step-1",
        ]
        assert await listed(world, job) == world.store.aliases()


@pytest.mark.slow
async def test_a_disk_that_takes_no_checkpoint_does_not_keep_a_job_from_being_cancelled(
    world: JobsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = asyncio.Event()
    loop = asyncio.get_running_loop()

    def no_room(*_args: object, **_named: object) -> None:
        loop.call_soon_threadsafe(refused.set)
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(world.store, "publish", no_room)
    world.script(steps=4, every=1, holds=1)
    job = await world.fine_tune()
    await refused.wait()
    await world.jobs.cancel(job.id, "ann")
    job = await world.until(job, lambda _: holders(world.folder(job)) == [])
    assert (await world.ledger.get(job.id)).state == "cancelled"
    assert world.folder(job).read_status().state != "succeeded", "it was ended, and did not end by itself"


@pytest.mark.slow
async def test_a_version_that_is_removed_while_it_is_measured_ends_its_job(world: JobsWorld, tmp_path: Path) -> None:
    from onebase_server.jobs.orders import Gate

    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    world.script(evaluate_holds=True)
    job = await world.retrain(dataset=data, gate=Gate())
    job = await world.until(job, lambda row: row.version == "bot@1")
    world.store.remove("bot@1")
    world.let_measure()
    job = await world.ended(job)
    assert job.error is not None
    assert (job.state, job.error["code"]) == ("failed", "version_removed")
    assert world.starts(job) == ["train", "evaluate"], "it does not train again"
    with pytest.raises(ModelNotFound):
        world.store.resolve("bot")
