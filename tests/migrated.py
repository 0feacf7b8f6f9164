"""A database file with its tables in it: made once a process, copied for each test. Migrating an own one takes five
times as long, and there are hundreds; what migrations do is tried in tests/server/records."""

import tempfile
from functools import cache
from pathlib import Path

from onebase_server.records.database import Database


def give_tables(path: Path) -> None:
    """Put an empty database there, unless there is one: then a test goes on where it was."""
    if not path.exists():
        path.write_bytes(_template())


@cache
def _template() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "onebase.db"
        Database.file(path)._migrate()  # in this thread: some of its callers run in an event loop, some do not
        return path.read_bytes()
