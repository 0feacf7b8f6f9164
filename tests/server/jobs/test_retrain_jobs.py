"""Retraining: the next version takes over only if the gate holds, and stored chats become its data."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from jobs_world import LINE, JobsWorld, jobs_world
from onebase.errors import AdapterInvalid, InvalidInput
from onebase.store import Version
from onebase_server.jobs import run_data
from onebase_server.jobs.orders import Gate
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.records.tables import ChatRow, FeedbackRow, JobRow

pytestmark = pytest.mark.anyio


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(LINE) + "\n") * 10)
    return path


def current(world: JobsWorld) -> str:
    return world.store.resolve("bot").id


@pytest.mark.slow
async def test_each_retraining_is_the_adapters_next_version(world: JobsWorld, dataset: Path) -> None:
    for number in (1, 2):
        job = await world.ended(await world.retrain(dataset=dataset))
        assert (job.state, job.version, current(world)) == ("succeeded", f"bot@{number}", f"bot@{number}")
    assert (await world.told(job))[-2].message == "New fine-tuned model created: bot@2"


@pytest.mark.slow
async def test_a_dataset_is_what_it_was_when_the_run_was_ordered(world: JobsWorld, dataset: Path) -> None:
    before = dataset.read_bytes()
    world.script(steps=3, every=1, ends=["crash early", "crash early", "succeed"], holds=0, evaluate_holds=True)
    job = await world.retrain(dataset=dataset, gate=Gate())
    job = await world.until(job, lambda row: row.attempt == 1)
    dataset.write_text("another's work\n")
    world.let_go()
    job = await world.until(job, lambda row: (row.message or "").startswith("evaluating"))
    recipe = yaml.safe_load(world.folder(job).recipe.read_text())
    assert [Path(path).read_bytes() for path in recipe["data"]["train"]] == [before]
    assert job.attempt == 3
    world.let_measure()
    assert (await world.ended(job)).state == "succeeded"
    await world.until(job, lambda row: not world.folder(row).dataset.exists())


async def test_a_dataset_that_can_not_be_read_fails_its_run_in_words(world: JobsWorld, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (("gone.jsonl", "gone.jsonl can't be read"), ("empty", "the folder empty holds no .jsonl")):
        job = await world.ended(await world.retrain(dataset=tmp_path / name))
        assert job.error is not None
        assert (job.state, job.error["code"], job.error["param"]) == ("failed", "invalid_dataset", "dataset")
        assert job.error["message"].startswith(words)
        assert str(tmp_path) not in job.error["message"]


@pytest.mark.slow
async def test_neither_a_cancellation_nor_the_servers_end_waits_for_a_large_dataset_to_be_copied(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(_source: Path, dest: Path, copied: Callable[[int], None]) -> None:
        dest.write_text("half")
        while True:
            copied(1_000_000)
            time.sleep(0.01)

    def is_copied(row: JobRow) -> bool:
        return (row.message or "").startswith("copying the dataset: ")

    with monkeypatch.context() as patch:
        patch.setattr(run_data, "copy_file", endless)
        async with jobs_world(tmp_path) as world:
            cancelled, going_on, waiting = [await world.retrain(dataset=dataset) for _ in range(3)]
            for job in (cancelled, going_on):
                await world.until(job, is_copied)
                assert world.folder(job).dataset_part.is_dir()
            await world.jobs.cancel(cancelled.id, None)
            job = await world.ended(cancelled)
            assert job.state == "cancelled"
            await world.until(job, lambda row: not world.folder(row).has_leftovers)
            await world.until(waiting, is_copied)
        assert not world.folder(going_on).dataset_part.exists()
    async with jobs_world(tmp_path) as world:
        for job in (going_on, waiting):
            job = await world.ended(job)
            assert (job.state, job.message) == ("succeeded", None)


async def test_a_dataset_that_the_disk_has_no_room_for_fails_its_run_before_it_is_copied(
    world: JobsWorld, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))  # type: ignore[attr-defined]
    job = await world.ended(await world.retrain(dataset=dataset))
    assert (job.error or {})["message"] == "it takes 0 MB, and the server's disk has 0 MB left"
    await world.until(job, lambda row: not world.folder(row).has_leftovers)


@pytest.mark.slow
async def test_a_first_version_passes_the_gate_and_a_worse_one_does_not(world: JobsWorld, dataset: Path) -> None:
    world.script(loss={"bot@1": 1.0, "bot@2": 1.5, "bot@3": 1.01})
    first = await world.ended(await world.retrain(dataset=dataset, gate=Gate()))
    assert (first.state, world.starts(first)) == ("succeeded", ["train", "evaluate"])
    worse = await world.ended(await world.retrain(dataset=dataset, gate=Gate()))
    assert worse.state == "failed"
    assert worse.error is not None
    assert worse.error["code"] == "gate_not_passed"
    assert "bot@2 was not published" in worse.error["message"]
    assert "bot@1 stays" in worse.error["message"]
    assert (current(world), world.starts(worse)) == ("bot@1", ["train", "evaluate"])
    near = await world.ended(await world.retrain(dataset=dataset, gate=Gate(max_loss_increase=0.02)))
    assert (near.state, current(world)) == ("succeeded", "bot@3")
    assert near.gate_report is not None
    assert near.gate_report["current"] == {"version": "bot@1", "loss": 1.0, "stop_rate": 1.0, "examples": 10}


@pytest.mark.slow
async def test_a_version_that_does_not_stop_does_not_pass(world: JobsWorld, dataset: Path) -> None:
    world.script(stop_rate={"bot@2": 0.5})
    await world.ended(await world.retrain(dataset=dataset))
    job = await world.ended(await world.retrain(dataset=dataset, gate=Gate()))
    assert job.error is not None
    assert "50% of its answers end by themselves" in job.error["message"]


@pytest.mark.slow
async def test_a_job_cancelled_at_its_gate_takes_its_version_back(world: JobsWorld, dataset: Path) -> None:
    await world.ended(await world.retrain(dataset=dataset))
    world.script(evaluate_holds=True)
    job = await world.retrain(dataset=dataset, gate=Gate())
    job = await world.until(job, lambda row: row.version == "bot@2")
    for _ in range(5):  # rounds in which a process that has said nothing yet would be told of
        await world.ledger.news.wait(0.05)
    assert (await world.ledger.get(job.id)).message == "evaluating bot@2 and bot@1"
    await world.jobs.cancel(job.id, None)
    job = await world.ended(job)
    entry = world.store.get("bot")
    assert entry is not None
    assert [version.id for version in entry.versions] == ["bot@1"]


def served(world: JobsWorld) -> dict[int, float]:
    entry = world.store.get("bot")
    return dict(entry.weights) if entry is not None else {}


def in_one_second(world: JobsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows tell times in seconds: whatever happens now, happens at the same time for them."""
    second = time.time()
    monkeypatch.setattr(world.ledger, "_now", lambda: second)


def roll_back(world: JobsWorld) -> None:
    world.store.rollback("bot", 1)


def publish(world: JobsWorld) -> None:
    world.store.set_current("bot", 2)


def split(world: JobsWorld) -> None:
    world.store.set_current("bot", {1: 0.9, 2: 0.1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "by_hand"), [(2, roll_back), (1, publish), (1, split)], ids=["rollback", "publish", "canary"]
)
async def test_a_name_that_was_moved_by_hand_stays_where_it_was_put(
    world: JobsWorld,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    by_hand: Callable[[JobsWorld], None],
) -> None:
    in_one_second(world, monkeypatch)
    for _ in range(2):
        await world.ended(await world.retrain(dataset=dataset))
    world.store.set_current("bot", before)
    job = await world.retrain(dataset=dataset, served_now=partial(served, world))
    by_hand(world)
    put = served(world)
    job = await world.ended(job)
    assert served(world) == put
    assert job.error is not None
    assert (job.state, job.error["code"], job.version) == ("failed", "name_moved", "bot@3")
    assert "bot was moved by hand" in job.error["message"]
    assert world.store.resolve("bot@3").version == 3, "it can still be published"


@pytest.mark.slow
async def test_a_hand_that_moved_the_name_just_before_the_order_does_not_count(
    world: JobsWorld, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_second(world, monkeypatch)
    for _ in range(2):
        await world.ended(await world.retrain(dataset=dataset))
    roll_back(world)
    job = await world.ended(await world.retrain(dataset=dataset, served_now=partial(served, world)))
    assert (job.state, served(world)) == ("succeeded", {3: 1.0})


@pytest.mark.slow
async def test_a_run_that_ends_while_the_next_one_is_being_made_is_no_hand(
    world: JobsWorld, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.ended(await world.retrain(dataset=dataset))
    second = await world.retrain(dataset=dataset)
    sync, has_ended, is_made = RunFolder.sync, threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(folder: RunFolder) -> None:
        loop.call_soon_threadsafe(is_made.set)
        has_ended.wait()
        sync(folder)

    monkeypatch.setattr(RunFolder, "sync", slowly)
    third = asyncio.create_task(world.retrain(dataset=dataset, served_now=partial(served, world)))
    await is_made.wait()
    assert (await world.ended(second)).state == "succeeded"
    has_ended.set()
    job = await world.ended(await third)
    assert (job.state, served(world)) == ("succeeded", {3: 1.0})


@pytest.mark.slow
async def test_a_name_that_the_adapters_other_runs_moved_moves_on_but_not_over_a_hand(
    world: JobsWorld, dataset: Path
) -> None:
    await world.ended(await world.retrain(dataset=dataset, served_now=dict))
    world.script(holds=1)
    second, third, fourth = [await world.retrain(dataset=dataset, served_now=lambda: {1: 1.0}) for _ in range(3)]
    fourth = await world.until(fourth, lambda row: row.state == "queued")
    await world.jobs.pause(fourth.id, None)
    world.let_go()
    assert [(await world.ended(job)).state for job in (second, third)] == ["succeeded", "succeeded"]
    roll_back(world)  # to what was served when the fourth was ordered, and by a hand all the same
    await world.jobs.resume(fourth.id, None)
    fourth = await world.ended(fourth)
    assert fourth.error is not None
    assert (fourth.error["code"], served(world)) == ("name_moved", {1: 1.0})


@pytest.mark.slow
async def test_a_version_is_loaded_before_its_name_moves_and_not_served_if_it_can_not_be(
    world: JobsWorld, dataset: Path
) -> None:
    served = []

    async def load(version: Version) -> None:
        entry = world.store.get("bot")
        served.append((version.id, dict(entry.weights) if entry else {}))
        if version.version == 2:
            raise AdapterInvalid("bot/2", ["it does not fit"])

    world.supervisor.bring_near = load
    first = await world.ended(await world.retrain(dataset=dataset))
    second = await world.ended(await world.retrain(dataset=dataset))
    assert served == [("bot@1", {}), ("bot@2", {1: 1.0})]
    assert (first.state, second.state, current(world)) == ("succeeded", "failed", "bot@1")
    assert second.error is not None
    assert second.error["code"] == "version_unservable"
    assert "bot@2 can't be served" in second.error["message"]
    entry = world.store.get("bot")
    assert entry is not None
    assert [version.id for version in entry.versions] == ["bot@1"]


async def test_chats_marked_good_become_the_next_versions_data(tmp_path: Path) -> None:
    async with jobs_world(tmp_path, start=False) as world:
        await check_what_is_learnt(world)


async def check_what_is_learnt(world: JobsWorld) -> None:
    for number in range(12):
        await world.chats.add(a_chat(number, finish="length" if number == 11 else "stop"))
        rating, better = ("bad", "Better!") if number == 0 else ("good", None)
        feedback = FeedbackRow(
            id=f"fb-{number}", owner="ann", chat_id=f"chat-{number}", created_at=1, rating=rating, better_answer=better
        )
        await world.chats.judge(feedback, None)
    job = await world.retrain(stored_chats=True)
    lines = [json.loads(line) for line in world.folder(job).training.read_text().splitlines()]
    assert [line["messages"][-1]["content"] for line in lines] == ["Better!", *(f"Arr {n}" for n in range(1, 11))]
    assert [message.get("weight") for message in lines[1]["messages"]] == [None, 0, None, None]


async def test_too_few_good_chats_are_refused_with_what_to_do(world: JobsWorld) -> None:
    with pytest.raises(InvalidInput, match=r"0 stored chat.*at least 10"):
        await world.retrain(stored_chats=True)
    assert list(world.home.runs.iterdir()) == []


async def test_exactly_one_source_must_be_named(world: JobsWorld, dataset: Path) -> None:
    with pytest.raises(InvalidInput, match="exactly one"):
        await world.retrain()
    with pytest.raises(InvalidInput, match="exactly one"):
        await world.retrain(dataset=dataset, stored_chats=True)


def a_chat(number: int, finish: str) -> ChatRow:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ahoy", "name": None},
        {"role": "user", "content": f"Say {number}"},
    ]
    answer = {"role": "assistant", "content": f"Arr {number}", "refusal": None}
    return ChatRow(
        id=f"chat-{number}", owner="ann", created_at=1, model="bot", adapter="bot", version="bot@1",
        request={"messages": messages}, response={"choices": [{"finish_reason": finish, "message": answer}]},
    )  # fmt: skip
