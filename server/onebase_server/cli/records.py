"""Work of a command on the database that the server uses, which may be running. Opened for the one command."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from onebase_server.api.audit import AuditLog
from onebase_server.records.database import Database
from onebase_server.settings import load_settings
from onebase_server.startup import in_words, prepare_home

T = TypeVar("T")


def on_database(home: Path | None, action: str | None, work: Callable[[Database], Awaitable[T]]) -> T:
    """Do it, and write an action (None: it only looks) to the audit log."""
    settings = load_settings(os.environ, {"home": home})
    prepare_home(settings.home)

    async def do() -> T:
        path = settings.home.root / "onebase.db"
        database = Database.at(settings.database) if settings.database else Database.file(path)
        try:
            with in_words(settings, path):
                await database.migrate()
                return await work(database)
        finally:
            await database.close()

    done = asyncio.run(do())
    if action is not None:
        AuditLog(settings.home.root / "audit").write({"key": "cli", "user": os.getuid(), "action": action})
    return done
