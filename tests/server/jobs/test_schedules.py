"""Schedules by a clock of the test's own: when they come, what they order, and what they pass over."""

import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from jobs_world import LINE, TINY, JobsWorld, jobs_world
from onebase.errors import InvalidInput, NotReady
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.orders import RetrainOrder
from onebase_server.jobs.run_data import files_of
from onebase_server.jobs.schedule_times import Timing
from onebase_server.jobs.schedules import Scheduler
from onebase_server.records.schedules import ScheduleRecords
from onebase_server.records.tables import ScheduleRow

pytestmark = pytest.mark.anyio

HOUR, DAY = 3600, 86_400
MONDAY = int(datetime(2026, 3, 2, tzinfo=ZoneInfo("UTC")).timestamp())


class Clock:
    def __init__(self) -> None:
        self.now = float(MONDAY)

    def __call__(self) -> float:
        return self.now


class Scheduled:
    """A jobs half whose supervisor sleeps, and a scheduler over it. `ready`: the base is loaded."""

    def __init__(self, world: JobsWorld, clock: Clock, data: Path) -> None:
        self.world, self.clock, self.data = world, clock, data
        self.scheduler = Scheduler(ScheduleRecords(world.database), Ledger(world.ledger.records, now=clock), world.jobs)
        self.scheduler.order_of = self.order_of
        self.ready = True

    def order_of(self, row: ScheduleRow) -> RetrainOrder:
        if not self.ready:
            raise NotReady("The base model is still being loaded.")
        return RetrainOrder(owner=row.owner, base=TINY, adapter=row.adapter, **{"dataset": self.data, **row.request})

    async def add(self, **timing: Any) -> None:
        await self.scheduler.add("bot", Timing(**timing), {}, "ann")

    async def at(self, seconds: float) -> ScheduleRow:
        """The only schedule, after a look so long after Monday began."""
        self.clock.now = MONDAY + seconds
        await self.scheduler.tick()
        [row] = await self.scheduler.records.list()
        return row

    async def jobs(self) -> list[str]:
        page = await self.world.jobs.list(None, kind="retrain", metadata=None, after=None, limit=100)
        return [row.id for row in page.rows]


@asynccontextmanager
async def open_scheduled(root: Path, **options: Any) -> AsyncIterator[Scheduled]:
    data = root / "data.jsonl"
    data.write_text((json.dumps(LINE) + "\n") * 10)
    async with jobs_world(root, start=False, **options) as world:
        yield Scheduled(world, Clock(), data)


@pytest.fixture
async def scheduled(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Scheduled]:
    async with open_scheduled(tmp_path) as scheduled:
        yield scheduled


@pytest.mark.parametrize(
    ("timing", "seconds"),
    [
        (Timing(cron="0 3 * * *"), 3 * HOUR),
        (Timing(cron="0 3 * * *", timezone="Europe/Berlin"), 2 * HOUR),
        (Timing(cron="*/15 * * * *"), HOUR / 4),
        (Timing(cron="0 0 * * 3"), 2 * DAY),
        (Timing(every="6h"), 6 * HOUR),
        (Timing(every="2w"), 14 * DAY),
    ],
)
def test_a_schedule_comes_first_at(timing: Timing, seconds: float) -> None:
    assert timing.first_after(MONDAY) == MONDAY + seconds


def test_a_night_stays_a_night_when_the_clocks_change() -> None:
    nightly, zone = Timing(cron="0 3 * * *", timezone="Europe/Berlin"), ZoneInfo("Europe/Berlin")
    due = nightly.first_after(int(datetime(2026, 3, 27, 12, tzinfo=zone).timestamp()))
    nights = []
    for _ in range(4):
        nights.append(datetime.fromtimestamp(due, zone))
        due = nightly.next_after(due, due)
    assert [night.day for night in nights] == [28, 29, 30, 31]
    assert {night.hour for night in nights} == {3}


@pytest.mark.parametrize(
    ("timing", "param"),
    [
        (Timing(cron="0 3 * *"), "cron"),
        (Timing(cron="0 25 * * *"), "cron"),
        (Timing(cron="0 0 30 2 *"), "cron"),
        (Timing(cron=""), "cron"),
        (Timing(every="soon"), "every"),
        (Timing(every="0h"), "every"),
        (Timing(cron="0 3 * * *", timezone="Berlin"), "timezone"),
        (Timing(cron="0 3 * * *", timezone="../etc/passwd"), "timezone"),
        (Timing(every="6h", timezone="Moon/Tycho"), "timezone"),
        (Timing(cron="0 3 * * *", every="6h"), "cron"),
        (Timing(), "cron"),
    ],
)
def test_a_timing_that_can_not_be_read_is_refused_by_field(timing: Timing, param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        timing.first_after(MONDAY)
    assert caught.value.param == param


async def test_each_time_orders_one_run(scheduled: Scheduled) -> None:
    await scheduled.add(cron="0 3 * * *")
    assert (await scheduled.at(3 * HOUR - 1)).last_run is None
    row = await scheduled.at(3 * HOUR)
    assert [row.last_run] == await scheduled.jobs()
    assert (row.last_at, row.next_at, row.note) == (MONDAY + 3 * HOUR, MONDAY + DAY + 3 * HOUR, None)
    job = await scheduled.world.ledger.get(row.last_run or "")
    assert (job.owner, job.adapter, job.dataset) == ("ann", "bot", str(scheduled.data))
    await scheduled.at(4 * HOUR)
    assert len(await scheduled.jobs()) == 1
    await scheduled.world.jobs.cancel(job.id, None)
    await scheduled.at(DAY + 3 * HOUR)
    assert len(await scheduled.jobs()) == 2


@pytest.mark.parametrize("timing", [{"cron": "0 3 * * *"}, {"every": "1d"}])
async def test_what_was_missed_is_made_up_for_once(scheduled: Scheduled, timing: dict[str, str]) -> None:
    await scheduled.add(**timing)
    row = await scheduled.at(5 * DAY + 4 * HOUR)
    assert len(await scheduled.jobs()) == 1
    assert 5 * DAY + 4 * HOUR < row.next_at - MONDAY <= 6 * DAY + 3 * HOUR
    await scheduled.at(5 * DAY + 5 * HOUR)
    assert len(await scheduled.jobs()) == 1


async def test_a_time_is_passed_over_while_a_job_of_the_adapter_is_going(scheduled: Scheduled) -> None:
    await scheduled.add(every="1h")
    first = (await scheduled.at(HOUR)).last_run
    row = await scheduled.at(2 * HOUR)
    assert (row.note, row.next_at) == (f"passed over: {first} was still going", MONDAY + 3 * HOUR)
    await scheduled.world.jobs.cancel(first or "", None)
    row = await scheduled.at(3 * HOUR)
    assert (row.note, len(await scheduled.jobs())) == (None, 2)


async def test_a_time_waits_for_the_base_and_for_a_place_in_the_queue(tmp_path: Path) -> None:
    async with open_scheduled(tmp_path, waiting=1) as scheduled:
        await scheduled.add(every="1h")
        scheduled.ready = False
        assert (await scheduled.at(HOUR)).next_at == MONDAY + HOUR
        scheduled.ready = True
        other = await scheduled.world.retrain(adapter="other", dataset=scheduled.data)
        assert (await scheduled.at(HOUR + 1)).next_at == MONDAY + HOUR
        await scheduled.world.jobs.cancel(other.id, None)
        assert (await scheduled.at(HOUR + 2)).last_at == MONDAY + HOUR + 2


async def test_one_that_fails_for_a_reason_of_ours_holds_no_other_up(
    scheduled: Scheduled, monkeypatch: pytest.MonkeyPatch
) -> None:
    for adapter in ("full", "bot"):
        await scheduled.scheduler.add(adapter, Timing(every="1h"), {}, "ann")
    retrain = scheduled.world.jobs.retrain

    async def no_room(order: RetrainOrder, *rest: Any) -> Any:
        if order.adapter == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return await retrain(order, *rest)

    monkeypatch.setattr(scheduled.world.jobs, "retrain", no_room)
    scheduled.clock.now = MONDAY + HOUR
    await scheduled.scheduler.tick()
    rows = {row.adapter: row for row in await scheduled.scheduler.records.list()}
    assert rows["full"].note == "could not be ordered; the server's log says why"
    assert {row.next_at for row in rows.values()} == {MONDAY + 2 * HOUR}
    assert [rows["bot"].last_run] == await scheduled.jobs()


async def test_what_can_not_be_ordered_says_why_and_is_tried_at_its_next_time(scheduled: Scheduled) -> None:
    await scheduled.scheduler.add(
        "bot", Timing(every="1h"), {"dataset": None, "stored_chats": True}, "ann"
    )  # and nobody has chatted
    row = await scheduled.at(HOUR)
    assert (row.note or "").startswith("could not be ordered: 0 stored chat(s) of 'bot'")
    assert (row.last_run, row.next_at) == (None, MONDAY + 2 * HOUR)


async def test_a_crash_between_the_run_and_the_note_of_it_makes_no_second_run(scheduled: Scheduled) -> None:
    await scheduled.add(every="1h")
    row = await scheduled.at(HOUR)
    await scheduled.scheduler.records.advance(row, next_at=MONDAY + HOUR)  # as it stood before the note
    await scheduled.world.jobs.cancel(row.last_run or "", None)
    again = await scheduled.at(HOUR + 5)
    assert (await scheduled.jobs(), again.last_run) == ([row.last_run], row.last_run)


async def test_a_removed_schedule_orders_no_more(scheduled: Scheduled) -> None:
    await scheduled.add(every="1h")
    [row] = await scheduled.scheduler.records.list()
    assert await scheduled.scheduler.records.remove(row.id)
    assert not await scheduled.scheduler.records.remove(row.id)
    scheduled.clock.now += DAY
    await scheduled.scheduler.tick()
    assert await scheduled.jobs() == []


async def test_the_supervisor_keeps_the_schedules(tmp_path: Path) -> None:
    async with open_scheduled(tmp_path) as scheduled:
        world = scheduled.world
        await scheduled.add(every="1h")
        scheduled.clock.now += HOUR
        supervisor = world.supervisor_over(scheduled.scheduler.tick)
        await supervisor.start()
        while not await scheduled.jobs():
            await world.ledger.news.wait(0.01)
        await supervisor.stop()


def test_a_folder_is_the_data_files_that_it_holds_now(tmp_path: Path) -> None:
    folder = tmp_path / "nightly"
    folder.mkdir()
    for name in ("b.jsonl", "a.json", "notes.txt", ".hidden"):
        (folder / name).write_text("{}\n")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (folder / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert files_of(folder) == [folder / "a.json", folder / "b.jsonl"]
    assert files_of(folder / "b.jsonl") == [folder / "b.jsonl"]
