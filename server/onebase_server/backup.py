"""A home folder to one file and back: adapters, uploaded files, runs, datasets, audit log, and the SQLite database.

Bases can be fetched again and are left out unless asked for; caches and locks always are. A running server need not
stop: versions and files are immutable once named, and SQLite copies itself consistently. PostgreSQL has its own tools.
The rows are from before the bytes, so that what comes meanwhile is swept as without a row, and what is deleted
meanwhile is taken out of the copy.
"""

import io
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from onebase.durable import fsync_folder
from onebase.errors import InvalidInput
from onebase.home import Home
from onebase.home_version import FILE as VERSION_FILE
from onebase.home_version import close_to_others
from onebase_server.records.homes import FILE as HOME_ID

FOLDERS = ("adapters", "files", "runs", "datasets", "audit", "evaluations")
DATABASE = "onebase.db"
NEW = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC


def back_up(home: Home, target: Path, *, with_bases: bool = False) -> int:
    """Write `target` (a .tar, or .tar.gz by its name), readable by its owner alone: it holds what the home folder does.

    Its size in bytes. Raises InvalidInput if it is there, or there is nothing to back up.
    """
    if not (home.root / VERSION_FILE).is_file():
        raise InvalidInput(f"{home.root} is no home folder of onebase: name yours by --home", param="home")
    if not target.absolute().parent.is_dir():
        raise InvalidInput(f"{target.absolute().parent} is no folder: make it first", param="target")
    if target.exists():
        raise InvalidInput(f"{target} is there already: name a new file", param="target")
    part = target.with_name(f".{target.name}.part")
    mode = "w:gz" if target.name.endswith(("gz", ".tgz")) else "w"
    try:
        with os.fdopen(os.open(part, NEW, 0o600), "wb") as raw, tarfile.open(fileobj=raw, mode=mode) as tar:  # type: ignore[call-overload]
            _add_version(tar, home)
            if (home.root / HOME_ID).is_file():
                _add_file(tar, home.root / HOME_ID, HOME_ID)
            with tempfile.TemporaryDirectory(dir=home.root, prefix=".backup-") as scratch:
                database = _copy_database(home, Path(scratch))
                added = set()
                for folder in (*FOLDERS, *(["bases"] if with_bases else [])):
                    for path in _lasting(home.root / folder):
                        # one that went away meanwhile (a removed version) is not in the backup, as if it went before
                        if _add_file(tar, path, str(path.relative_to(home.root))):
                            added.add(path)
                if database is not None:
                    _drop_rows_without_bytes(database, {path.name for path in added if path.parent == home.files})
                    _add_file(tar, database, DATABASE)
            tar.close()
            raw.flush()
            os.fsync(raw.fileno())
        os.rename(part, target)
    finally:
        part.unlink(missing_ok=True)
    fsync_folder(target.absolute().parent)
    return target.stat().st_size


def restore(source: Path, home: Home) -> list[str]:
    """Unpack into a home folder that is empty or not there; the top names. Raises InvalidInput, leaving nothing."""
    if not source.is_file():
        raise InvalidInput(f"{source} is no file", param="source")
    if home.root.exists() and any(home.root.iterdir()):
        raise InvalidInput(f"{home.root} is not empty: restore into a new folder and move it into place", param="home")
    home.root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.root.parent, prefix=".restore-") as scratch:
        try:
            with tarfile.open(source) as tar:
                tar.extractall(scratch, filter="data")  # no links out, no absolute names, no devices
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InvalidInput(f"{source} can't be unpacked: {error}", param="source") from error
        if not (Path(scratch) / VERSION_FILE).is_file():
            raise InvalidInput(f"{source} is no backup of a home folder: it names no version", param="source")
        _check_database(Path(scratch) / DATABASE)
        names = sorted(path.name for path in Path(scratch).iterdir())
        home.root.mkdir(mode=0o700, exist_ok=True)
        for folder in (path for path in Path(scratch).iterdir() if path.is_dir()):
            folder.chmod(0o700)
        for name in names:
            os.rename(Path(scratch) / name, home.root / name)
        close_to_others(home.root)  # an empty folder that was there, and older backups, may be open
    home.create()
    return names


def _lasting(folder: Path) -> Iterator[Path]:
    """Plain files below, without half-written ones."""
    for place, folders, names in os.walk(folder):  # which, unlike rglob, passes over a folder that goes away meanwhile
        folders[:] = sorted(name for name in folders if _lasts(name))
        for path in (Path(place) / name for name in sorted(names) if _lasts(name)):
            if path.is_file() and not path.is_symlink():
                yield path


def _lasts(name: str) -> bool:
    return not name.startswith(".") and not name.endswith((".part", ".lock", ".tmp"))


def _add_version(tar: tarfile.TarFile, home: Home) -> None:
    data = (home.root / VERSION_FILE).read_bytes()
    info = tarfile.TarInfo(VERSION_FILE)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _copy_database(home: Home, scratch: Path) -> Path | None:
    path, copy = home.root / DATABASE, scratch / DATABASE
    if not path.is_file():
        return None
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


def _drop_rows_without_bytes(database: Path, kept: set[str]) -> None:
    """Of uploaded files that were deleted after the rows were copied. `kept`: the ids whose bytes are in the backup."""
    with closing(sqlite3.connect(database)) as copy, copy:
        if copy.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'files'").fetchone():
            rows = copy.execute("SELECT id FROM files").fetchall()
            copy.executemany("DELETE FROM files WHERE id = ?", [row for row in rows if row[0] not in kept])


def _add_file(tar: tarfile.TarFile, path: Path, name: str) -> bool:
    """False if it is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return False
    with file:
        info = tar.gettarinfo(arcname=name, fileobj=file)
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        if info.islnk():  # a second name of bytes that are in the tar: kept as bytes, so that order does not matter
            info.type, info.linkname, info.size = tarfile.REGTYPE, "", os.fstat(file.fileno()).st_size
        tar.addfile(info, file)
    return True


def _check_database(path: Path) -> None:
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise InvalidInput(f"the database in the backup is damaged: {found}", param="source")
