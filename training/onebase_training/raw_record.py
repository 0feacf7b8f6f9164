"""What reading a source yields: records not yet understood, and what could not be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RawRecord:
    line: int
    """Where the record starts, from 1; the record's number for hub datasets."""
    value: object


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    text: str
    is_record: bool = True
    """False: of the file as a whole."""

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table as a record: without its empty columns, and a column of turns as a list of turns.

    Tables give every row every column, and some give `{"from": [...], "value": [...]}` for a list of objects.
    """
    return {key: _turns(value) for key, value in row.items() if value is not None}


def renamed(value: object, columns: Mapping[str, str]) -> object:
    """The record under our column names. `columns` says ours -> the data's; the others stay as they are."""
    if not columns or not isinstance(value, Mapping):
        return value
    kept = {key: item for key, item in value.items() if key not in columns and key not in columns.values()}
    return kept | {our: value[their] for our, their in columns.items() if their in value}


def _turns(value: Any) -> Any:
    if not isinstance(value, Mapping) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    columns = list(value.values())
    if len({len(column) for column in columns}) != 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
