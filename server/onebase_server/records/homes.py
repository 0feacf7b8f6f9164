"""Which home folder a database belongs to: its rows name files and runs that lie in one folder only.

Of two homes on one database each would take up the other's jobs, find none of their files, and fail them. A copy of a
folder can't be told from the folder itself: whoever restores one beside it is warned.
"""

import secrets
from pathlib import Path

from sqlalchemy import select, text

from onebase.durable import locked, replace_file
from onebase.errors import InvalidInput
from onebase_server.records.database import Database
from onebase_server.records.tables import HomeRow

FILE = "home-id"


async def claim(database: Database, root: Path) -> None:
    """Make the database the home folder's, if it is nobody's yet. Raises InvalidInput if it is another's."""
    mine = home_id(root)
    async with database.write() as session:
        if session.get_bind().dialect.name == "postgresql":  # two first claims at once: the second waits here
            await session.execute(text("LOCK TABLE homes IN EXCLUSIVE MODE"))
        owner = await session.scalar(select(HomeRow.id))
        if owner is None:
            session.add(HomeRow(id=mine))
        elif owner != mine:
            raise InvalidInput(
                f"the database belongs to another home folder ({owner}; {root} is {mine}): give each a database of its "
                f"own. If {root} is that folder, restored or moved, write {owner} into {root / FILE}",
                param="database",
            )


def home_id(root: Path) -> str:
    """Made once for each folder; copies and backups of it keep it."""
    path = root / FILE
    with locked(root / "locks" / f"{FILE}.lock"):
        if not path.exists():
            replace_file(path, f"{secrets.token_hex(12)}\n".encode())
    return path.read_text("ascii").strip()
