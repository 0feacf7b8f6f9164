"""A fine-tuning job from its file to a served version, over real processes that follow a script."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from jobs_world import JobsWorld, jobs_world
from onebase.errors import InvalidInput, Overloaded
from postgres_server import postgres

pytestmark = pytest.mark.anyio


async def test_a_job_walks_through_its_states_and_ends_as_a_model(world: JobsWorld) -> None:
    world.script(steps=4, every=2)
    job = await world.fine_tune(suffix="My Bot!")
    assert (job.state, job.hyperparameters["n_epochs"]) == ("validating_files", "auto")
    job = await world.ended(job)
    assert job.state == "succeeded", job.error
    assert job.hyperparameters == {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 1}
    assert (job.step, job.total_steps, job.trained_tokens) == (4, 4, 1000)
    name = f"ft:tiny/base:onebase:my-bot:{job.id[-8:]}"
    assert job.fine_tuned_model == name
    assert world.store.resolve(name).id == job.version == world.store.resolve(f"my-bot-{job.id[-8:]}").id
    told = [event.message for event in await world.told(job)]
    assert told[:4] + sorted(told[4:-2]) + told[-2:] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"Checkpoint created at step 2 with Snapshot ID: {name}:ckpt-step-2",
        f"Checkpoint created at step 4 with Snapshot ID: {name}:ckpt-step-4",
        "Step 1/4: training loss=2.00",
        "Step 2/4: training loss=1.00",
        "Step 3/4: training loss=0.67",
        "Step 4/4: training loss=0.50",
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]


@pytest.mark.slow
async def test_its_result_file_is_openais_table(world: JobsWorld) -> None:
    world.script(steps=2)
    job = await world.ended(await world.fine_tune())
    (file_id,) = job.result_files
    row = await world.files.get(file_id, "ann")
    assert (row.purpose, row.filename) == ("fine-tune-results", "step_metrics.csv")
    with world.files.open(row) as content:
        assert content.read().decode().splitlines() == [
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
            "1,2.00000,0.50000,,",
            "2,1.00000,0.75000,,",
        ]


@pytest.mark.slow
async def test_each_checkpoint_is_a_model_and_three_stay(world: JobsWorld) -> None:
    world.script(steps=5, every=1)
    job = await world.ended(await world.fine_tune())
    points = (await world.jobs.checkpoints(job.id, "ann", after=None, limit=10)).rows
    assert [point.step for point in points] == [5, 4, 3]
    served = {world.store.resolve(point.model).id for point in points}
    assert served == {point.version for point in points}
    assert points[0].metrics["train_loss"] == 0.4
    entry = world.store.get(job.adapter)
    assert entry is not None
    assert len(entry.versions) == 4
    assert entry.current is not None
    assert entry.current.id == job.version


@pytest.mark.parametrize(
    ("lines", "code"),
    [(3, "invalid_n_examples"), (0, None)],
)
async def test_a_file_that_can_not_be_trained_on_fails_the_job_and_starts_nothing(
    world: JobsWorld, lines: int, code: str | None
) -> None:
    if code is None:
        upload = world.files.begin()
        upload.write(b'{"messages": [{"content": "no role"}]}\n' * 10)
        row = await world.files.keep(upload, filename="x.jsonl", purpose="fine-tune", owner="ann")
        job = await world.fine_tune(training_file=row.id)
    else:
        job = await world.fine_tune(lines=lines)
    job = await world.ended(job)
    assert job.state == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == (code or "invalid_training_file", "training_file")
    assert world.starts(job) == []
    assert (await world.told(job))[-1].level == "error"


async def test_a_job_whose_files_are_gone_fails_and_holds_nobody_up(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        job = await world.fine_tune()
        world.folder(job).remove()
    async with jobs_world(tmp_path) as world:
        job = await world.ended(job)
        assert job.error is not None
        assert (job.state, job.error["code"]) == ("failed", "internal_error")


async def test_a_job_has_its_files_also_when_the_answer_to_its_commit_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        add = world.ledger.add

        async def lost(*given: Any) -> None:
            await add(*given)
            raise OperationalError("COMMIT", None, Exception("the connection was lost"))

        def no_room(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(world.ledger, "add", lost)
        with pytest.raises(OperationalError):
            await world.fine_tune()
        monkeypatch.setattr(world.files, "link", no_room)
        with pytest.raises(OSError, match="no space left"):
            await world.fine_tune()
        [job] = (await world.jobs.list(None, kind=None, metadata=None, after=None, limit=10)).rows
        assert list(world.home.runs.iterdir()) == [world.folder(job).path]
        assert world.folder(job).training.stat().st_size > 0


@pytest.mark.slow
async def test_after_its_end_a_job_keeps_no_data_of_its_file_and_everything_else(world: JobsWorld) -> None:
    job = await world.ended(await world.fine_tune())
    await world.until(job, lambda row: not world.folder(row).training.exists())
    assert world.folder(job).log.exists()
    assert world.folder(job).recipe.exists()


@pytest.mark.slow
async def test_a_job_runs_on_postgresql_too(tmp_path: Path) -> None:
    with postgres() as url:
        async with jobs_world(tmp_path, database=url) as world:
            world.script(ends=["crash", "succeed"], every=1)
            jobs = [await world.fine_tune(metadata={"a": "b"}, key=str(number)) for number in range(2)]
            assert [(await world.ended(job)).state for job in jobs] == ["succeeded", "succeeded"]
            messages = [event.message async for event in world.jobs.follow(jobs[0].id)]
            assert messages[-1] == "The job has successfully completed"


async def test_a_file_of_somebody_else_does_not_exist(world: JobsWorld) -> None:
    row = await world.upload(owner="bob")
    with pytest.raises(InvalidInput, match="does not exist") as caught:
        await world.fine_tune(training_file=row.id)
    assert caught.value.param == "training_file"
    assert list(world.home.runs.iterdir()) == []


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_a_file_whose_bytes_are_gone_is_refused_by_the_field_that_names_it(tmp_path: Path, param: str) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        there, gone = [await world.upload() for _ in range(2)]
        (world.home.files / gone.id).unlink()
        with pytest.raises(InvalidInput, match=f"{gone.id}.*does not exist") as caught:
            await world.fine_tune(**{"training_file": there.id, param: gone.id})
        assert caught.value.param == param
        assert list(world.home.runs.iterdir()) == []


async def test_an_idempotency_key_makes_one_job(world: JobsWorld) -> None:
    file = await world.upload()
    first = await world.fine_tune(training_file=file.id, key="k")
    again = await world.fine_tune(training_file=file.id, key="k")
    assert again.id == first.id
    assert [path.name for path in world.home.runs.iterdir()] == [first.id]
    with pytest.raises(InvalidInput, match="another request"):
        await world.fine_tune(training_file=file.id, key="k", suffix="other")


async def test_a_key_that_comes_again_finds_its_job_whatever_has_changed_and_two_at_once_make_one(
    tmp_path: Path,
) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        file = await world.upload()
        jobs = await asyncio.gather(*(world.fine_tune(training_file=file.id, key="k") for _ in range(4)))
        assert len({job.id for job in jobs}) == 1
        await world.files.delete(file.id, "ann")
    async with jobs_world(tmp_path, start=False) as world:
        assert (await world.fine_tune(training_file=file.id, key="k")).id == jobs[0].id
        assert [path.name for path in world.home.runs.iterdir()] == [jobs[0].id]


async def test_more_jobs_than_may_wait_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, start=False, waiting=2) as world:
        jobs = [await world.fine_tune(key=str(number)) for number in range(2)]
        with pytest.raises(Overloaded):
            await world.fine_tune()
        again = await world.fine_tune(training_file=jobs[0].training_file, key="0")
        assert again.id == jobs[0].id
        assert {path.name for path in world.home.runs.iterdir()} == {job.id for job in jobs}


@pytest.mark.parametrize("limit", ["waiting", "waiting_of_owner"])
async def test_orders_at_the_same_time_get_no_more_places_than_there_are(tmp_path: Path, limit: str) -> None:
    async with jobs_world(tmp_path, start=False, **{limit: 2}) as world:
        file = await world.upload()
        orders = (world.fine_tune(training_file=file.id) for _ in range(8))
        given = await asyncio.gather(*orders, return_exceptions=True)
        made = {job.id for job in given if not isinstance(job, BaseException)}
        assert [type(job) for job in given if isinstance(job, BaseException)] == [Overloaded] * 6
        assert {path.name for path in world.home.runs.iterdir()} == made


async def test_one_owner_can_not_fill_the_queue_nor_by_pausing(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, start=False, waiting_of_owner=2) as world:
        first, _ = [await world.fine_tune(lines=10, suffix=str(number)) for number in range(2)]
        await world.ledger.change(first.id, {"state": "paused"}, when=("validating_files",))
        with pytest.raises(Overloaded, match="2 jobs of yours wait or are paused"):
            await world.fine_tune()
        assert await world.retrain(owner="bob", dataset=tmp_path)
        await world.jobs.cancel(first.id, "ann")
        assert await world.fine_tune()


@pytest.mark.slow
async def test_events_can_be_followed_to_the_end(world: JobsWorld) -> None:
    job = await world.fine_tune()
    messages = [event.message async for event in world.jobs.follow(job.id)]
    assert messages[0].startswith("Created fine-tuning job")
    assert messages[-1] == "The job has successfully completed"
    assert len(messages) == len(set(messages))
