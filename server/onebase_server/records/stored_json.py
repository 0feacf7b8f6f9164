"""JSON in a column, of which a damaged value costs its own row only.

SQLite keeps JSON as text, and a bad sector or a hand in the file can leave text that does not parse. To raise then
would fail every list and every round of the supervisor that meets the row. So it reads as empty, never as null: a null
list of a key's models would mean all of them.
"""

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import JSON, Dialect
from sqlalchemy.types import TypeDecorator

logger = logging.getLogger(__name__)


class StoredJson(TypeDecorator[Any]):
    """`empty` makes what a damaged value reads as. A Python None is SQL's NULL: `IS NULL` has to find it."""

    impl = JSON
    cache_ok = True

    def __init__(self, empty: type[dict[str, Any]] | type[list[str]]) -> None:
        self.empty = empty
        super().__init__(none_as_null=True)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        process = super().result_processor(dialect, coltype)
        if process is None:
            return None

        def read(value: Any) -> Any:
            try:
                return process(value)
            except ValueError:
                logger.error("a row of the database holds JSON that does not parse; it is read as empty")
                return self.empty()

        return read
