"""Files are kept whole or not at all, and what a crash leaves behind is swept."""

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrated import give_tables
from onebase.errors import InvalidInput, NotFound
from onebase_server.jobs.files import FileService
from onebase_server.records.database import Database
from onebase_server.records.files import FileRecords
from onebase_server.records.tables import FileRow

pytestmark = pytest.mark.anyio
LINE = b'{"prompt": "a", "completion": "b"}\n'


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def files(tmp_path: Path, folder: Path, clock: Clock, anyio_backend: str) -> AsyncIterator[FileService]:
    give_tables(tmp_path / "x.db")
    database = Database.file(tmp_path / "x.db")
    await database.migrate()
    yield FileService(folder, FileRecords(database), limit=1000, now=clock)
    await database.close()


async def keep(files: FileService, data: bytes = LINE, **given: object) -> FileRow:
    upload = files.begin()
    upload.write(data)
    values = {"filename": "a.jsonl", "purpose": "fine-tune", "owner": "ann", **given}
    return await files.keep(upload, **values)  # type: ignore[arg-type]


async def test_the_bytes_come_back_exactly_with_their_hash(files: FileService) -> None:
    row = await keep(files, LINE * 3)
    assert (row.bytes, row.status) == (len(LINE) * 3, "processed")
    with files.open(await files.get(row.id, "ann")) as content:
        assert content.read() == LINE * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"purpose": "fun"}, "'fun' is not one of"),
        ({"filename": "a.txt"}, "Invalid extension txt"),
        ({"filename": ""}, "needs a name"),
        ({"filename": "a\x00.jsonl"}, "needs a name"),
        ({"data": b"nope\n"}, "Line 1 is not valid JSON"),
    ],
)
async def test_what_may_not_be_kept_leaves_nothing_behind(
    files: FileService, folder: Path, given: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        await keep(files, **given)  # type: ignore[arg-type]
    assert list(folder.iterdir()) == []
    assert (await files.list(None, purpose=None, after=None, limit=10, order="asc")).rows == []


async def test_a_file_over_the_limit_is_refused_while_it_comes(files: FileService, folder: Path) -> None:
    upload = files.begin()
    upload.write(b"x" * 600)
    with pytest.raises(InvalidInput, match="larger than 1000 bytes"):
        upload.write(b"x" * 600)
    upload.discard()
    assert list(folder.iterdir()) == []


async def test_a_hostile_name_is_kept_as_data_and_touches_no_path(files: FileService, folder: Path) -> None:
    row = await keep(files, filename="../../etc/ünï \u202e.jsonl")
    assert row.filename == "../../etc/ünï \u202e.jsonl"
    assert [path.name for path in folder.iterdir()] == [row.id]


async def test_a_run_keeps_its_bytes_when_the_file_is_deleted(files: FileService, tmp_path: Path) -> None:
    row = await keep(files)
    files.link(row, tmp_path / "run.jsonl")
    await files.delete(row.id, "ann")
    assert (tmp_path / "run.jsonl").read_bytes() == LINE
    with pytest.raises(NotFound):
        await files.get(row.id, "ann")
    with pytest.raises(NotFound):
        files.open(row)


async def test_nobody_elses_file_can_be_seen_or_deleted(files: FileService) -> None:
    row = await keep(files)
    with pytest.raises(NotFound, match=row.id):
        await files.delete(row.id, "bob")
    assert (await files.get(row.id, None)).id == row.id


async def test_an_expired_file_is_gone_and_then_swept(files: FileService, folder: Path, clock: Clock) -> None:
    row = await keep(files, expires_in=3600)
    assert row.expires_at == 4600
    clock.now = 4600
    with pytest.raises(NotFound):
        await files.get(row.id, "ann")
    await files.sweep()
    assert list(folder.iterdir()) == []


async def test_a_sweep_removes_what_a_crash_left_and_spares_what_is_on_its_way(
    files: FileService, folder: Path, clock: Clock
) -> None:
    row = await keep(files)
    left, coming = files.begin(), files.begin()
    left.sync()
    (folder / "file-without-row").write_bytes(b"x")
    (folder / "lost+found").mkdir()  # a file system's own, where the folder is its root
    clock.now = time.time()
    for old in (left.part, folder / "file-without-row", folder / row.id, folder / "lost+found"):
        os.utime(old, (clock.now - 4000, clock.now - 4000))
    await files.sweep()
    assert {path.name for path in folder.iterdir()} == {row.id, coming.part.name, "lost+found"}
    coming.discard()
