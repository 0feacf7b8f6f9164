"""What must hold before a server starts, each said in words that name the fix; `onebase doctor` asks the same.

Nothing here loads the base or opens a port.
"""

import asyncio
import errno
import os
import resource
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from onebase.errors import BaseModelError, InvalidInput
from onebase.home import Home
from onebase_server.records.database import Database
from onebase_server.records.homes import claim
from onebase_server.records.keys import KeyRecords
from onebase_server.records.standing import Standing, standing_at, standing_of_file
from onebase_server.settings import LOOPBACK, Settings

LOW_DISK_MB = 500
MANY_FILES = 65_536


def prepare_home(home: Home) -> None:
    """Make and upgrade the folder. Raises InvalidInput if it can't be used."""
    try:
        home.create()
        (home.root / "datasets").mkdir(exist_ok=True)
        check_writable(home.root)
    except OSError as error:
        raise InvalidInput(
            f"the home folder {home.root} can't be written to ({error.strerror}): give this user the right to, or name "
            "another by ONEBASE_HOME",
            param="home",
        ) from error


def allow_many_files() -> int:
    """Raise this process's own limit of open files as far as it may; the limit then. A stream is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def check_writable(folder: Path) -> None:
    """Raises OSError. Really writes: permissions say little about a read-only mount or a full disk."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.open("xb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def free_mb(folder: Path) -> int:
    return shutil.disk_usage(folder).free // 1_000_000


def open_records(settings: Settings) -> bool:
    """Migrate the database; whether a key was ever made in it. Raises InvalidInput with words."""
    return asyncio.run(_open_records(settings))


def look_at_records(settings: Settings) -> Standing:
    """How the database stands, which is left as it is. Raises InvalidInput with words."""
    path = settings.home.root / "onebase.db"
    with in_words(settings, path):
        return standing_at(settings.database) if settings.database else standing_of_file(path)


async def _open_records(settings: Settings) -> bool:
    path = settings.home.root / "onebase.db"
    database = Database.at(settings.database) if settings.database else Database.file(path)
    try:
        with in_words(settings, path):
            await database.migrate()
            if settings.database:
                await claim(database, settings.home.root)
            return await KeyRecords(database).any()
    finally:
        await database.close()


@contextmanager
def in_words(settings: Settings, path: Path) -> Iterator[None]:
    """SQLAlchemy's errors as InvalidInput. `path`: of the SQLite file, if that is what is used."""
    try:
        yield
    except DatabaseError as error:
        place = "the database" if settings.database else str(path)
        raise InvalidInput(f"{place} can't be used: {reason_of(error)}", param="database") from error
    except SQLAlchemyError as error:
        raise InvalidInput(f"the database can't be used: {type(error).__name__}", param="database") from error


def reason_of(error: DatabaseError) -> str:
    """The driver's own words, without the statement and without the URL, which holds a password."""
    words = str(error.orig).strip().splitlines()[0] if error.orig is not None else type(error).__name__
    if "not a database" in words or "malformed" in words:
        return f"{words}. Put it aside and restore a backup (docs/operations.md), or start with an empty one"
    return words


def check_exposed(settings: Settings, has_table_keys: bool) -> None:
    """Raises InvalidInput if others could reach a server that asks nobody for a key."""
    open_to_others = settings.host not in LOOPBACK and not settings.allow_no_keys
    if open_to_others and not (settings.has_keys or has_table_keys):
        raise InvalidInput(
            f"host {settings.host} can be reached from outside and there is no key: make one by `onebase keys create "
            "--scope admin --name me`, or set ONEBASE_API_KEYS and ONEBASE_ADMIN_KEY, or listen on 127.0.0.1, or say "
            "--allow-no-keys if others should get in",
            param="host",
        )


def check_base_there(settings: Settings) -> None:
    """Raises BaseModelError for a disk so full that the base could not even be unpacked."""
    if free_mb(settings.home.root) < LOW_DISK_MB and not any(settings.home.bases.iterdir()):
        raise BaseModelError(
            f"the disk of {settings.home.root} has {free_mb(settings.home.root)} MB left, and a base takes more than "
            f"{LOW_DISK_MB} MB: free some, or put ONEBASE_HOME elsewhere",
            param="home",
        )


def check_port_free(host: str, port: int) -> None:
    """Raises InvalidInput if something else listens there. Port 0 takes any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            mend = {
                errno.EADDRINUSE: "end what does, or name another by ONEBASE_PORT",
                errno.EACCES: "name one above 1023 by ONEBASE_PORT, or give this user the right to it",
            }.get(error.errno or 0, "name an address of this machine by ONEBASE_HOST")
            raise InvalidInput(f"can't listen on {host}:{port} ({error.strerror}): {mend}", param="port") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's on a GPU, and torch's on a CPU, which is told by its words only."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)
