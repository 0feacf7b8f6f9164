"""The home folder over its life: versions and upgrades, start-up checks in clear words, backup and restore."""

import asyncio
import io
import json
import os
import shutil
import sqlite3
import tarfile
from collections import namedtuple
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from api_world import lora_folder
from onebase.errors import InvalidInput
from onebase.home import Home
from onebase.home_version import CURRENT, STEPS, upgrade, version_of
from onebase.store import AdapterStore
from onebase_server import doctor, startup
from onebase_server.api.keys import KeyOrder, new_key
from onebase_server.backup import back_up, restore
from onebase_server.cli.main import app
from onebase_server.jobs.files import FileService
from onebase_server.records.database import Database
from onebase_server.records.files import FileRecords
from onebase_server.records.homes import home_id
from onebase_server.records.keys import KeyRecords
from onebase_server.settings import Settings, load_settings
from scripted_base import IDENTITY

pytestmark = pytest.mark.slow  # seconds: each test makes a database
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def full(home: Home) -> dict[str, Any]:
    """Put one of each in: an adapter in two versions, a file, a key."""

    async def records() -> tuple[str, str]:
        database = Database.file(home.root / "onebase.db")
        await database.migrate()
        files = FileService(home.files, FileRecords(database))
        upload = files.begin()
        upload.write(b"what was uploaded")
        row = await files.keep(upload, filename="x.txt", purpose="user_data", owner="ann")
        key_row, key = new_key(KeyOrder("ann", owner="ann"), 1)
        await KeyRecords(database).add(key_row)
        await database.close()
        return row.id, key

    store = AdapterStore(home.adapters)
    for _ in range(2):
        store.publish(lora_folder(home.root.parent / "peft"), "pirate", base=IDENTITY)
    store.rollback("pirate")
    file_id, key = asyncio.run(records())
    return {"file": file_id, "key": key}


# Versions


def test_a_new_home_has_the_current_version_and_is_its_owners_alone(home: Home) -> None:
    assert version_of(home.root) == CURRENT
    assert home.root.stat().st_mode & 0o077 == 0


def test_a_home_from_before_versions_is_upgraded_and_keeps_everything(home: Home) -> None:
    made = full(home)
    (home.root / "version").unlink()
    home.root.chmod(0o755)
    assert version_of(home.root) == 0
    home.create()
    assert version_of(home.root) == CURRENT
    assert home.root.stat().st_mode & 0o077 == 0
    assert AdapterStore(home.adapters).resolve("pirate").version == 1
    assert (home.files / made["file"]).read_bytes() == b"what was uploaded"


def test_a_newer_home_is_refused_and_left_alone(home: Home) -> None:
    (home.root / "version").write_text(f"{CURRENT + 1}\n")
    with pytest.raises(InvalidInput, match="install the newer onebase again"):
        home.create()
    assert version_of(home.root) == CURRENT + 1


def test_a_folder_whose_version_is_no_number_is_not_taken_for_a_home(home: Home) -> None:
    (home.root / "version").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match=r"is .* a home folder"):
        home.create()


@pytest.mark.parametrize("killed_in", range(len(STEPS)))
def test_an_upgrade_that_was_killed_is_done_again(home: Home, killed_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (home.root / "version").unlink()

    def killed(root: Path) -> None:
        STEPS[killed_in](root)
        raise KeyboardInterrupt

    steps = (*STEPS[:killed_in], killed, *STEPS[killed_in + 1 :])
    with monkeypatch.context() as patched:
        patched.setattr("onebase.home_version.STEPS", steps)
        with pytest.raises(KeyboardInterrupt):
            upgrade(home.root)
    assert version_of(home.root) == 0
    assert upgrade(home.root) == 0
    assert version_of(home.root) == CURRENT


def test_an_older_database_is_brought_up_with_its_rows(home: Home) -> None:
    older(home)
    assert startup.open_records(Settings(home=home)) is True
    with closing(sqlite3.connect(home.root / "onebase.db")) as database:
        assert database.execute("SELECT id, parallel FROM keys").fetchall() == [("key_1", None)]


# Start-up checks


def test_a_home_that_is_a_file_or_can_not_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InvalidInput, match=r"can't be written to .*ONEBASE_HOME"):
        startup.prepare_home(Home(tmp_path / "taken"))


@pytest.mark.parametrize(
    "damage", [b"this is no database at all, but long enough" * 20, b"SQLite format 3\0" + b"x" * 4096]
)
def test_a_database_that_is_none_is_said_so_and_left_alone(home: Home, damage: bytes) -> None:
    path = home.root / "onebase.db"
    path.write_bytes(damage)
    with pytest.raises(InvalidInput, match="can't be used"):
        startup.open_records(Settings(home=home))
    assert path.read_bytes() == damage


def test_the_database_of_another_home_is_refused_at_the_start(home: Home, tmp_path: Path) -> None:
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    startup.open_records(Settings(home=home, database=shared))
    other = Home(tmp_path / "other").create()
    with pytest.raises(InvalidInput, match=rf"belongs to another home folder \({home_id(home.root)}"):
        startup.open_records(Settings(home=other, database=shared))


def test_a_database_that_does_not_answer_is_said_so_without_its_password(home: Home) -> None:
    settings = Settings(home=home, database="postgresql://onebase:hunter2@127.0.0.1:1/onebase")
    with pytest.raises(InvalidInput, match="the database can't be used") as refused:
        startup.open_records(settings)
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize(
    ("changes", "table", "is_open"),
    [
        ({}, False, True),
        ({"host": "0.0.0.0"}, False, False),
        ({"host": "::"}, False, False),
        ({"host": "0.0.0.0"}, True, True),
        ({"host": "0.0.0.0", "api_keys": ("sk-long-enough",)}, False, True),
        ({"host": "0.0.0.0", "allow_no_keys": True}, False, True),
    ],
    ids=str,
)
def test_others_are_let_in_with_keys_or_on_purpose_only(
    home: Home, changes: dict[str, Any], table: bool, is_open: bool
) -> None:
    settings = replace(Settings(home=home), **changes)
    if is_open:
        startup.check_exposed(settings, table)
    else:
        with pytest.raises(InvalidInput, match="onebase keys create"):
            startup.check_exposed(settings, table)


def test_doctor_finds_what_is_wrong_and_says_what_to_do(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    full(home)
    settings = load_settings({"ONEBASE_PORT": "0"}, {"home": home.root})
    found = {finding.what: finding for finding in doctor.examine(settings, whole=True)}
    assert [what for what, finding in found.items() if finding.verdict == "fail" and what != "packages"] == []
    assert "2 versions, checksums right" in found["adapters"].words

    weights = AdapterStore(home.adapters).resolve("pirate@1").path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (home.root / "onebase.db").write_bytes(b"not a database" * 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10))
    found = {finding.what: finding for finding in doctor.examine(settings, whole=True)}
    assert found["adapters"].verdict == "fail"
    assert "pirate@1" in found["adapters"].words
    assert found["database"].verdict == "fail"
    assert found["disk"].verdict == "fail"


def older(home: Home) -> None:
    """A database as the first onebase left it."""
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import create_engine

    from onebase_server.records.database import MIGRATIONS

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = create_engine(f"sqlite:///{home.root / 'onebase.db'}")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql(
            "INSERT INTO keys (id, owner, name, hash, scopes, created_at) VALUES ('key_1', 'ann', 'old', 'h', '[]', 1)"
        )
        connection.commit()
    engine.dispose()


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_doctor_changes_nothing_and_says_that_a_database_is_old_or_too_new(home: Home) -> None:
    older(home)
    before = bytes_below(home.root)
    done = CliRunner().invoke(app, ["doctor", "--home", str(home.root)], env={"ONEBASE_PORT": "0"})
    assert "warn database: SQLite is whole, of an older onebase (0001): the next start brings it up" in done.output
    assert "ok   keys: set" in done.output
    assert bytes_below(home.root) == before

    startup.open_records(Settings(home=home))
    with closing(sqlite3.connect(home.root / "onebase.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    done = CliRunner().invoke(app, ["doctor", "--json", "--home", str(home.root)], env={"ONEBASE_PORT": "0"})
    told = json.loads(done.output)
    [finding] = [each for each in told["findings"] if each["what"] == "database"]
    assert (done.exit_code, told["ok"], finding["verdict"]) == (1, False, "fail")
    assert "newer onebase" in finding["words"]


def test_doctor_looks_into_the_database_of_a_running_server(home: Home) -> None:
    startup.open_records(Settings(home=home))
    with closing(sqlite3.connect(home.root / "onebase.db")) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO files SELECT * FROM files")
        found = {finding.what: finding for finding in doctor.examine(load_settings({}, {"home": home.root}))}
        assert (found["database"].verdict, found["keys"].verdict) == ("ok", "warn"), found


# Backup and restore


@pytest.mark.parametrize("name", ["all.tar", "all.tar.gz"])
def test_a_backup_of_a_running_home_restores_everything(home: Home, tmp_path: Path, name: str) -> None:
    made = full(home)
    identity = home_id(home.root)
    with closing(sqlite3.connect(home.root / "onebase.db")) as writer:  # a transaction is open all the while
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE keys SET name = 'not committed'")
        assert back_up(home, tmp_path / name) > 0
        writer.rollback()
    target = Home(tmp_path / "elsewhere")
    restore(tmp_path / name, target)
    assert version_of(target.root) == CURRENT
    assert home_id(target.root) == identity
    assert target.root.stat().st_mode & 0o077 == 0
    store = AdapterStore(target.adapters)
    assert [version.id for entry in store.list() for version in entry.versions] == ["pirate@1", "pirate@2"]
    assert store.resolve("pirate").id == "pirate@1", "what was rolled back to"
    assert all(doctor.is_whole(version) for entry in store.list() for version in entry.versions)
    assert (target.files / made["file"]).read_bytes() == b"what was uploaded"
    with closing(sqlite3.connect(target.root / "onebase.db")) as database:
        assert database.execute("SELECT name FROM keys").fetchall() == [("ann",)]


def test_what_goes_away_while_a_backup_is_written_is_not_in_it_in_any_part(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, deleted = (full(Home(home.root))["file"] for _ in range(2))
    checkpoint, half = home.runs / "run-1/work/checkpoint-2", home.runs / "run-1/dataset.part"
    for folder in (checkpoint, half):
        folder.mkdir(parents=True)
        (folder / "a.json").write_text("{}")
    scandir = os.scandir

    def rotated_away(folder: Any) -> Any:
        if str(folder) == str(checkpoint):
            shutil.rmtree(folder)
        if str(folder) == str(home.files):
            (home.files / deleted).unlink(missing_ok=True)
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", rotated_away)
        back_up(home, tmp_path / "b.tar")
    target = Home(tmp_path / "elsewhere")
    restore(tmp_path / "b.tar", target)
    assert [path.name for path in target.files.iterdir()] == [kept]
    with closing(sqlite3.connect(target.root / "onebase.db")) as database:
        assert database.execute("SELECT id FROM files").fetchall() == [(kept,)]
        assert len(database.execute("SELECT id FROM keys").fetchall()) == 2
    assert not (target.runs / "run-1").exists()


@pytest.mark.parametrize("claimed", [True, False])
def test_whoever_restores_a_folder_that_has_claimed_a_database_is_warned(
    home: Home, tmp_path: Path, claimed: bool
) -> None:
    if claimed:
        home_id(home.root)
    back_up(home, tmp_path / "b.tar")
    done = CliRunner().invoke(app, ["restore", str(tmp_path / "b.tar"), "--home", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert ("never run servers on both" in done.output) == claimed
    assert (f"{tmp_path / 'new' / 'home-id'}" in done.output) == claimed


def readable_by_others(folder: Path) -> list[str]:
    """Names of what others may look into if they can get at the folder at all."""
    return sorted(path.name for path in (folder, *folder.iterdir()) if path.stat().st_mode & 0o077)


def test_only_the_owner_can_read_the_home_its_backup_and_what_is_restored(home: Home, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        full(home)
        back_up(home, tmp_path / "b.tar")
        target = Home(tmp_path / "elsewhere")
        target.root.mkdir(mode=0o755)
        restore(tmp_path / "b.tar", target)
    finally:
        os.umask(before)
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    assert (home.root / "onebase.db").stat().st_mode & 0o777 == 0o600
    for each in (home, target):
        assert set(readable_by_others(each.root)) <= {"version"}
        assert all(path.stat().st_mode & 0o077 == 0 for path in each.files.iterdir())


def test_a_home_or_a_folder_that_is_not_there_is_not_backed_up(home: Home, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no home folder"):
        back_up(Home(tmp_path / "typo"), tmp_path / "b.tar")
    assert not (tmp_path / "typo").exists()
    with pytest.raises(InvalidInput, match="make it first"):
        back_up(home, tmp_path / "no" / "b.tar")


def test_a_backup_says_that_another_database_is_not_in_it(home: Home, tmp_path: Path) -> None:
    words = ["backup", str(tmp_path / "b.tar"), "--home", str(home.root)]
    done = CliRunner().invoke(app, words, env={"ONEBASE_DATABASE": "postgresql://onebase:hunter2@127.0.0.1:1/onebase"})
    assert "pg_dump" in done.output
    assert "hunter2" not in done.output


def test_a_backup_never_overwrites_and_a_restore_never_mixes(home: Home, tmp_path: Path) -> None:
    full(home)
    back_up(home, tmp_path / "b.tar")
    before = (tmp_path / "b.tar").read_bytes()
    with pytest.raises(InvalidInput, match="is there already"):
        back_up(home, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() == before
    with pytest.raises(InvalidInput, match="not empty"):
        restore(tmp_path / "b.tar", home)


def evil_tar(path: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        for each, data in (("version", b"1\n"), (name, b"evil")):
            info = tarfile.TarInfo(each)
            info.size = len(data)
            if each == name:
                info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../outside", tarfile.REGTYPE, ""),
        ("adapters/../../outside", tarfile.REGTYPE, ""),
        ("adapters", tarfile.SYMTYPE, "/etc"),
        ("files/x", tarfile.SYMTYPE, "../../../etc/passwd"),
        ("files/x", tarfile.LNKTYPE, "../outside"),
        ("files/x", tarfile.CHRTYPE, ""),
    ],
    ids=str,
)
def test_a_backup_that_reaches_outside_is_refused_whole(tmp_path: Path, name: str, kind: bytes, link: str) -> None:
    target = Home(tmp_path / "new" / "home")
    with pytest.raises(InvalidInput, match="can't be unpacked"):
        restore(evil_tar(tmp_path / "evil.tar", name, kind, link), target)
    assert not target.root.exists()
    assert list((tmp_path / "new").iterdir()) == []
    assert not (tmp_path / "outside").exists()


def test_a_truncated_backup_or_one_of_something_else_is_refused(home: Home, tmp_path: Path) -> None:
    full(home)
    back_up(home, tmp_path / "b.tar.gz")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "b.tar.gz").read_bytes()[:-200])
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(home.root / "version", "something")
    for name in ("cut.tar.gz", "other.tar"):
        with pytest.raises(InvalidInput):
            restore(tmp_path / name, Home(tmp_path / "new" / "home"))
        assert not (tmp_path / "new" / "home").exists()


# The command line


def command(home: Home, *words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--home", str(home.root)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_keys_on_the_command_line_are_made_listed_revoked_and_written_down(home: Home) -> None:
    made = command(
        home, "keys", "create", "--name", "ann", "--scope", "training", "--models", "a, b", "--expires", "30d"
    )
    key_id = next(word for word in made.split() if word.startswith("key_"))
    assert "sk-ob-" in made
    assert key_id in command(home, "keys", "ls")
    assert "revoked" in command(home, "keys", "revoke", key_id)
    [path] = (home.root / "audit").iterdir()
    told = [json.loads(line)["action"] for line in path.read_text().splitlines()]
    assert told == [f"keys create {key_id}", f"keys revoke {key_id}"]
    assert "sk-ob-" not in path.read_text()


@pytest.mark.parametrize("words", [["--scope", "root"], ["--expires", "soon"], ["--owner", "../x"]], ids=str)
def test_a_wrong_key_order_on_the_command_line_makes_none(home: Home, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["keys", "create", "--name", "ann", *words, "--home", str(home.root)])
    assert (done.exit_code, words[0] in done.output) == (2, True), done.output
    assert "no key yet" in command(home, "keys", "ls")
