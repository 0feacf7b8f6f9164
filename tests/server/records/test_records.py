"""Rows come back as they were kept, pages are complete, and two writers never both win."""

import asyncio
import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DatabaseError, IntegrityError

from onebase.errors import InvalidInput, Overloaded
from onebase_server.api.errors import answer_for
from onebase_server.api.keys import KeyOrder, new_key
from onebase_server.records.chats import ChatRecords
from onebase_server.records.database import Database
from onebase_server.records.files import FileRecords
from onebase_server.records.homes import claim, home_id
from onebase_server.records.jobs import LOOKED_UP, Count, JobRecords, NewCheckpoint, NewEvent
from onebase_server.records.keys import KeyRecords
from onebase_server.records.standing import standing_at
from onebase_server.records.tables import Base, ChatRow, FeedbackRow, FileRow, JobRow

pytestmark = pytest.mark.anyio


def a_file(number: int, **values: Any) -> FileRow:
    columns = dict(
        id=f"file-{number}", owner="ann", filename="a.jsonl", purpose="fine-tune", bytes=3, sha256="0" * 64,
        created_at=100 + number, status="processed",
    )  # fmt: skip
    return FileRow(**{**columns, **values})


def a_job(number: int, **values: Any) -> JobRow:
    columns = dict(
        id=f"ftjob-{number}", owner="ann", kind="fine_tuning", state="queued", priority=0, created_at=100,
        request_digest="d", model="base", adapter="a", seed=1, preset="default",
        hyperparameters={"n_epochs": "auto"}, recipe={}, attempt=0, run_open=False, step=0,
        total_steps=0, result_files=[],
    )  # fmt: skip
    return JobRow(**{**columns, **values})


def a_chat(number: int, **values: Any) -> ChatRow:
    columns = dict(
        id=f"chatcmpl-{number}", owner="ann", created_at=1, model="pirate", adapter="pirate", version="pirate@1",
        request={"messages": [{"role": "user", "content": "Ahoy \x00 ünï"}]}, response={"choices": []},
    )  # fmt: skip
    return ChatRow(**{**columns, **values})


async def test_the_migrations_make_exactly_the_tables_of_the_code(url: str, database: Database) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


async def test_migrating_twice_and_from_two_servers_at_once_changes_nothing(url: str, database: Database) -> None:
    other = Database.at(url)
    await FileRecords(database).add(a_file(1))
    await asyncio.gather(other.migrate(), database.migrate())
    assert await FileRecords(other).ids() == {"file-1"}
    await other.close()


async def test_a_database_of_a_newer_onebase_is_refused_and_left_alone(tmp_path: Path) -> None:
    database = Database.file(tmp_path / "x.db")
    await database.migrate()
    async with database.write() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvalidInput, match="newer onebase"):
        await database.migrate()
    await FileRecords(database).add(a_file(1))
    assert await FileRecords(database).ids() == {"file-1"}
    await database.close()


async def test_a_database_belongs_to_one_home_folder(database: Database, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("first", "second")]
    for root in roots:
        (root / "locks").mkdir(parents=True)
    for _ in range(2):
        await claim(database, roots[0])
    with pytest.raises(InvalidInput, match="belongs to another home folder") as caught:
        await claim(database, roots[1])
    shutil.copy(roots[0] / "home-id", roots[1] / "home-id")  # as the message says of a restored one
    assert home_id(roots[0]) in caught.value.message
    await claim(database, roots[1])


async def test_a_database_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="mysql"):
        Database.at("mysql://host/name")
    with pytest.raises(InvalidInput, match="does not parse"):
        Database.at("not a url")


async def test_pages_of_files_are_complete_in_both_orders(database: Database) -> None:
    files = FileRecords(database)
    for number in range(7):
        await files.add(a_file(number, purpose="fine-tune" if number != 3 else "batch"))
    for order, expected in (("desc", [6, 5, 4, 2, 1, 0]), ("asc", [0, 1, 2, 4, 5, 6])):
        seen: list[str] = []
        after, more = None, True
        while more:
            page = await files.list("ann", purpose="fine-tune", after=after, limit=4, order=order)  # type: ignore[arg-type]
            seen += [row.id for row in page.rows]
            after, more = seen[-1], page.has_more
        assert seen == [f"file-{number}" for number in expected]


async def test_an_owner_sees_only_its_own_rows_and_can_not_page_from_anothers(database: Database) -> None:
    files = FileRecords(database)
    await files.add(a_file(1))
    await files.add(a_file(2, owner="bob"))
    assert await files.get("file-2", "ann") is None
    assert (await files.get("file-2", None)) is not None
    page = await files.list("ann", purpose=None, after=None, limit=10, order="asc")
    assert [row.id for row in page.rows] == ["file-1"]
    with pytest.raises(InvalidInput, match="file-2"):
        await files.list("ann", purpose=None, after="file-2", limit=10, order="asc")


async def test_a_deleted_file_is_deleted_once(database: Database) -> None:
    files = FileRecords(database)
    await files.add(a_file(1))
    assert [await files.delete("file-1"), await files.delete("file-1")] == [True, False]


async def test_the_same_idempotency_key_makes_one_job_even_at_once(database: Database) -> None:
    jobs = JobRecords(database)
    made = await asyncio.gather(
        *(jobs.add(a_job(n, idempotency_key="k"), [NewEvent("created", "x")], event_ids=[f"e{n}"]) for n in range(5))
    )
    assert sorted(created for _, created in made) == [False, False, False, False, True]
    assert len({job.id for job, _ in made}) == 1
    with pytest.raises(InvalidInput, match="used for another request"):
        await jobs.add(a_job(9, idempotency_key="k", request_digest="other"), [], event_ids=[])
    other, created = await jobs.add(a_job(10, idempotency_key="k", owner="bob"), [], event_ids=[])
    assert created
    assert other.owner == "bob"


async def test_what_makes_room_for_a_job_is_counted_where_it_is_made(database: Database) -> None:
    records = JobRecords(database)

    async def for_two(count: Count) -> None:
        if await count(("queued",), "ann") >= 2:
            raise Overloaded("full", retry_after_s=1)

    rows = [a_job(number, owner="ann", state="queued") for number in range(8)]
    made = (records.add(row, [], event_ids=[], check_room=for_two) for row in rows)
    given = await asyncio.gather(*made, return_exceptions=True)
    assert sum(isinstance(each, Overloaded) for each in given) == 6
    assert await records.count(("queued",), "ann") == 2


async def test_what_room_a_file_has_is_counted_where_it_is_kept(database: Database) -> None:
    records = FileRecords(database)

    def fits(stored: int) -> None:
        if stored + 3 > 7:
            raise Overloaded("full")

    adding = [records.add(a_file(number), fits) for number in range(6)]
    results = await asyncio.gather(*adding, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["NoneType"] * 2 + ["Overloaded"] * 4
    assert len(await records.ids()) == 2
    await records.add(a_file(7, owner="bob"), fits)


async def test_of_two_changes_from_one_state_only_one_wins_and_its_events_only_are_told(database: Database) -> None:
    jobs = JobRecords(database)
    await jobs.add(a_job(1), [NewEvent("created", "made")], event_ids=["e0"])
    changes = [
        jobs.change(
            "ftjob-1", {"state": state}, when=["queued"], now=5, events=[(f"e-{state}", NewEvent(state, state))]
        )
        for state in ("running", "cancelled")
    ]
    won = [job.state for job in await asyncio.gather(*changes) if job is not None]
    assert len(won) == 1
    events = await jobs.events("ftjob-1", after=None, limit=10)
    assert [event.message for event in events.rows] == [*won, "made"]


async def test_an_event_or_checkpoint_that_is_told_again_adds_nothing(database: Database) -> None:
    jobs = JobRecords(database)
    await jobs.add(a_job(1), [], event_ids=[])
    for attempt in range(2):
        await jobs.change(
            "ftjob-1", {}, when=["queued"], now=5,
            events=[(f"e{attempt}", NewEvent("step:1", "Step 1", type="metrics", data={"train_loss": 0.5}))],
            checkpoints=[(f"c{attempt}", NewCheckpoint(10, "ft:x:ckpt-step-10", "x@1", {"train_loss": 0.5}))],
        )  # fmt: skip
    events = (await jobs.events("ftjob-1", after=None, limit=10)).rows
    assert [(event.id, event.data) for event in events] == [("e0", {"train_loss": 0.5})]
    checkpoints = (await jobs.checkpoints("ftjob-1", after=None, limit=10)).rows
    assert [(point.id, point.step) for point in checkpoints] == [("c0", 10)]
    assert await jobs.events_since("ftjob-1", events[0].seq) == []


async def test_which_run_ended_last_and_after_which_order_is_told_by_the_events_and_not_by_the_second(
    database: Database,
) -> None:
    records = JobRecords(database)
    first, second, third = (a_job(number, adapter="bot", version=f"bot@{number}") for number in (1, 2, 3))

    async def make(job: JobRow) -> None:
        await records.add(job, [NewEvent("created", "Created")], event_ids=[f"{job.id}-made"])

    async def end(job: JobRow) -> None:
        event = (f"{job.id}-end", NewEvent("succeeded", "Done"))
        assert await records.change(job.id, {"finished_at": 1}, when=(job.state,), now=1, events=[event]) is not None

    async def last() -> str | None:
        return await records.last_version("bot", "succeeded", after=(third.id, "created"))

    await make(first)
    await make(second)
    await end(second)
    await make(third)
    assert await last() is None
    await end(first)
    assert await last() == "bot@1"
    assert await records.last_version("bot", "succeeded", after=(first.id, "created")) == "bot@1"
    assert await records.last_version("other", "succeeded", after=(first.id, "created")) is None


async def test_a_long_story_can_be_told_again_at_once(database: Database) -> None:
    jobs = JobRecords(database)
    await jobs.add(a_job(1), [], event_ids=[])
    story = [NewEvent(f"step:{number}", "x", type="metrics") for number in range(LOOKED_UP + 100)]
    for attempt in range(2):
        events = [(f"e{attempt}-{number}", event) for number, event in enumerate(story)]
        await jobs.change("ftjob-1", {}, when=["queued"], now=5, events=events[: LOOKED_UP + 100 * attempt])
    told = await jobs.events_since("ftjob-1", 0)
    assert [event.key for event in told] == [event.key for event in story]


async def test_the_queue_goes_by_priority_and_then_by_age(database: Database) -> None:
    jobs = JobRecords(database)
    for number, priority in enumerate([0, 5, 0, 5, -1]):
        await jobs.add(a_job(number, priority=priority), [], event_ids=[])
    assert [job.id[-1] for job in await jobs.in_states(["queued"])] == ["1", "3", "0", "2", "4"]


async def test_a_nul_in_an_id_is_the_callers_mistake_and_no_outage(database: Database) -> None:
    """PostgreSQL has no NUL in text; SQLite finds nothing under such an id."""
    try:
        status = 200 if await ChatRecords(database).get("chat\x00", None) else 404
    except DatabaseError as error:
        status = answer_for(error, request_id="req_1").status
    assert status == (404 if database._sqlite else 400)


async def test_jobs_are_found_by_metadata_whatever_the_key(database: Database) -> None:
    keys = ["team", "we.ird", 'quo"te', "$", "ünï", "a' OR 1=1 --"]
    jobs = JobRecords(database)
    await jobs.add(a_job(1, meta={**dict.fromkeys(keys, "blue"), "other": "x"}), [], event_ids=[])
    await jobs.add(a_job(2, meta=dict.fromkeys(keys, "red")), [], event_ids=[])
    await jobs.add(a_job(3), [], event_ids=[])

    async def found(metadata: Any) -> list[str]:
        page = await jobs.list("ann", kind=None, metadata=metadata, after=None, limit=10)
        return [job.id[-1] for job in page.rows]

    for key in keys:
        assert await found({key: "blue"}) == ["1"]
        assert await found({key: "blue", "other": "y"}) == []
    assert await found("null") == ["3"]


async def test_a_row_of_damaged_metadata_is_passed_over(tmp_path: Path) -> None:
    database = Database.file(tmp_path / "onebase.db")
    await database.migrate()
    jobs = JobRecords(database)
    for number in range(2):
        await jobs.add(a_job(number, meta={"team": "blue"}), [], event_ids=[])
    with closing(sqlite3.connect(tmp_path / "onebase.db")) as file:
        file.execute("UPDATE jobs SET meta = '{\"half' WHERE id = ?", (a_job(0).id,))
        file.commit()
    page = await jobs.list("ann", kind=None, metadata={"team": "blue"}, after=None, limit=10)
    assert [job.id for job in page.rows] == [a_job(1).id]
    await database.close()


async def test_feedback_marks_the_chat_and_the_marked_ones_are_found_in_order(database: Database) -> None:
    chats = ChatRecords(database)
    for number in range(5):
        await chats.add(a_chat(number, adapter="pirate" if number != 4 else "poet"))

    async def judge(number: int, rating: str | None, better: str | None = None, owner: str | None = "ann") -> bool:
        feedback = FeedbackRow(
            id=f"fb-{number}-{rating}", owner="ann", chat_id=f"chatcmpl-{number}", created_at=2, rating=rating,
            better_answer=better,
        )  # fmt: skip
        return await chats.judge(feedback, owner) is not None

    assert await judge(0, "good")
    assert await judge(1, "bad")
    assert await judge(2, "bad", "Arr, better!")
    assert await judge(3, "good")
    assert await judge(3, "bad")  # a later judgement takes the place of the first
    assert await judge(4, "good")
    assert not await judge(0, "bad", owner="bob")
    found = [chat async for chat in chats.worth_learning("pirate", "ann")]
    assert [(chat.id[-1], chat.better_answer) for chat in found] == [("0", None), ("2", "Arr, better!")]
    assert found[0].request["messages"][0]["content"] == "Ahoy \x00 ünï"
    assert await chats.delete("chatcmpl-0", "ann")
    assert not await chats.delete("chatcmpl-0", "ann")


async def test_a_writer_of_another_process_is_waited_for(tmp_path: Path) -> None:
    first, second = Database.file(tmp_path / "x.db"), Database.file(tmp_path / "x.db")
    await first.migrate()
    await asyncio.gather(
        *(FileRecords(database).add(a_file(n * 2 + i)) for n in range(20) for i, database in enumerate((first, second)))
    )
    assert len(await FileRecords(first).ids()) == 40
    await first.close()
    await second.close()


async def test_an_error_of_the_database_does_not_tell_what_was_to_be_written(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the treasure is under the palm"
    row = {"request": {"messages": [{"role": "user", "content": secret}]}}
    await ChatRecords(database).add(a_chat(1, **row))
    try:
        await ChatRecords(database).add(a_chat(1, **row))
    except IntegrityError:
        logging.getLogger("test").exception("could not be stored")
    assert "could not be stored" in caplog.text
    assert "IntegrityError" in caplog.text
    assert secret not in caplog.text


async def test_how_a_database_stands_is_asked_without_changing_it(database: Database, url: str) -> None:
    standing = await asyncio.to_thread(standing_at, url)
    assert (standing.is_current, standing.is_known, standing.has_keys, standing.damage) == (True, True, False, None)
    row, _ = new_key(KeyOrder("ann"), 1)
    await KeyRecords(database).add(row)
    assert (await asyncio.to_thread(standing_at, url)).has_keys
    async with database.write() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    try:
        newer = await asyncio.to_thread(standing_at, url)
    finally:
        async with database.write() as session:
            await session.execute(text("UPDATE alembic_version SET version_num = :was"), {"was": standing.revision})
    assert (newer.revision, newer.is_known, newer.is_current) == ("9999", False, False)
