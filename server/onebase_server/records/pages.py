"""Keyset pages over `seq`, the way OpenAI's lists page, and the filters that lists share. Knows no table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, Select, case, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession

from onebase.errors import InvalidInput

Row = TypeVar("Row")
Order = Literal["asc", "desc"]
MetadataFilter = Mapping[str, str] | Literal["null"]


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows in order, and whether more follow."""

    rows: Sequence[Row]
    has_more: bool


async def page(
    session: AsyncSession, query: Select[Row], table: Any, *, after: str | None, limit: int, order: Order
) -> Page[Row]:
    """The `limit` rows of `query` that follow the row whose id is `after`. `table` is the mapped class.

    Raises InvalidInput when `after` names no row of the query: a page from nowhere would look like the end.
    """
    if after is not None:
        cursor = await session.scalar(query.where(table.id == after).with_only_columns(table.seq))
        if cursor is None:
            raise unknown_cursor(after)
        query = query.where(table.seq < cursor if order == "desc" else table.seq > cursor)
    query = query.order_by(table.seq.desc() if order == "desc" else table.seq.asc()).limit(limit + 1)
    rows: Sequence[Any] = (await session.scalars(query)).all()
    return Page(rows[:limit], len(rows) > limit)


def unknown_cursor(after: str) -> InvalidInput:
    """For every list, whether a table holds it or not."""
    return InvalidInput(f"No item '{after}' in this list to go on after.", param="after")


def page_of(items: Sequence[Row], ids: Sequence[str], after: str | None, limit: int) -> Page[Row]:
    """Of a list at hand: what follows the item whose id is `after`. Raises InvalidInput for one that is not in it."""
    if after is not None and after not in ids:
        raise unknown_cursor(after)
    start = 0 if after is None else ids.index(after) + 1
    return Page(items[start : start + limit], start + limit < len(items))


def metadata_is(session: AsyncSession, column: Any, wanted: MetadataFilter) -> list[ColumnElement[bool]]:
    """Conditions for `metadata[key]=value` filters, all of which must hold; "null" asks for rows without metadata."""
    if wanted == "null":
        return [column.is_(None)]
    if session.get_bind().dialect.name == "postgresql":
        return [column[key].as_string() == value for key, value in wanted.items()]
    # SQLite's JSON paths have no escape for a quote in a key, so compare keys as plain values.
    conditions: list[ColumnElement[bool]] = []
    whole = case((func.json_valid(column), column), else_=literal_column("'{}'"))  # of a damaged row nothing is true
    for key, value in wanted.items():
        pairs = func.json_each(whole).table_valued("key", "value")
        conditions.append(select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value).exists())
    return conditions
