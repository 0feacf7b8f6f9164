"""How a database stands, asked without changing a byte of it: for `onebase doctor`. `Database.migrate` is what changes.

SQLite is opened read-only, PostgreSQL in a read-only transaction.
"""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, create_engine, inspect, select
from sqlalchemy.engine import URL

from onebase_server.records.database import MIGRATIONS, parse_url
from onebase_server.records.tables import KeyRow


@dataclass(frozen=True, slots=True)
class Standing:
    revision: str | None
    """None: it has no tables of ours yet."""
    is_known: bool
    """Whether this code has the revision; else a newer onebase has written it."""
    is_current: bool
    has_keys: bool
    damage: str | None
    """SQLite's own words for what it found wrong; None: nothing, or PostgreSQL, which looks after itself."""


def standing_of_file(path: Path) -> Standing:
    """Of a SQLite file that is there. Raises SQLAlchemy's DatabaseError if it is none or can't be opened."""
    quoted = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return _standing(URL.create("sqlite", database=f"file:{quoted}", query={"mode": "ro", "uri": "true"}))


def standing_at(url: str) -> Standing:
    """Of the database of a setting. Raises InvalidInput for no URL, SQLAlchemyError if it does not answer."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        return standing_of_file(Path(parsed.database or ""))
    return _standing(parsed.set(drivername="postgresql+psycopg"))


def _standing(url: URL) -> Standing:
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(MIGRATIONS))
    engine = create_engine(url, hide_parameters=True)
    is_file = url.get_backend_name() == "sqlite"
    try:
        with engine.connect().execution_options(**({} if is_file else {"postgresql_readonly": True})) as connection:
            damage = _damage_of(connection) if is_file else None
            revision = MigrationContext.configure(connection).get_current_revision()
            has_keys = inspect(connection).has_table(KeyRow.__tablename__) and (
                connection.scalar(select(KeyRow.seq).limit(1)) is not None
            )
    finally:
        engine.dispose()
    known = {script.revision for script in scripts.walk_revisions()}
    return Standing(
        revision=revision,
        is_known=revision is None or revision in known,
        is_current=revision == scripts.get_current_head(),
        has_keys=has_keys,
        damage=damage,
    )


def _damage_of(connection: Connection) -> str | None:
    found = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
    return None if found == "ok" else found
