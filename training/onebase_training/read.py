"""Dataset files -> records with their line numbers, one at a time. Knows files, not formats' meaning.

JSON lines are read one by one, a JSON list element by element, a `.txt` file chunk by chunk: files larger than memory
stream through. A broken line becomes a `Problem`, never an exception: the caller reports them all.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

from onebase.errors import DatasetError
from onebase_training.config import DataConfig, Source
from onebase_training.hub_rows import hub_rows, saved_rows
from onebase_training.raw_record import Problem, RawRecord, renamed
from onebase_training.tables import csv_rows, parquet_rows
from onebase_training.text_stream import NOT_UTF8, BadText, chunks, json_list, no_constant, text_blocks

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_FILES: Final = (".jsonl", ".json", ".ndjson", ".txt", ".md", ".csv", ".tsv", ".parquet", ".gz", ".zip", ".zst")
_LONGEST_LINE: Final = 64 << 20
"""Bytes. A longer one can only be another kind of file, and would have to be held whole."""


def locate(source: Source, folder: Path) -> Path | None:
    """The source's file or folder, or None for a hub dataset. Raises DatasetError when it is neither."""
    try:
        given = Path(source.path).expanduser()
        for candidate in (folder / given, given):
            if candidate.is_file() or candidate.is_dir():
                return candidate
    except (OSError, RuntimeError) as error:  # no permission, a name too long, ~nobody
        raise DatasetError(source.path, [f"can't be read: {error}"]) from error
    if _HUB_ID.fullmatch(source.path) and given.suffix.lower() not in _FILES:
        return None
    raise DatasetError(source.path, [f"no such file (looked in {folder.resolve()} and {Path.cwd()})"])


def read_records(source: Source, folder: Path, config: DataConfig) -> Iterator[RawRecord | Problem]:
    """All records of a source in order, under our column names."""
    path = locate(source, folder)
    found: Iterator[RawRecord | Problem]
    if path is None:
        found = hub_rows(source)
    elif path.is_dir():
        found = saved_rows(path, source)
    else:
        found = _read_file(path, source, config)
    empty = True
    for record in found:
        empty = False
        if isinstance(record, RawRecord):
            yield RawRecord(record.line, renamed(record.value, source.columns))
        else:
            yield record
    if empty:
        yield Problem(1, "the file holds no record", is_record=False)


def _read_file(path: Path, source: Source, config: DataConfig) -> Iterator[RawRecord | Problem]:
    kind = path.suffix.lower()
    try:
        if source.format == "text" or kind in (".txt", ".md"):
            for line, chunk in chunks(text_blocks(path), config.chunk_chars, config.chunk_overlap):
                yield RawRecord(line, {"text": config.chunk_prefix + chunk})
        elif kind in (".csv", ".tsv"):
            yield from csv_rows(path)
        elif kind == ".parquet":
            yield from parquet_rows(path, source.path)
        elif _first_character(path) == b"[":
            for line, value in json_list(text_blocks(path)):
                yield RawRecord(line, value)
        else:
            yield from _read_lines(path)
    except BadText as error:
        yield Problem(error.line, error.text)
    except OSError as error:
        raise DatasetError(source.path, [f"can't be read: {error.strerror}"]) from error


def _first_character(path: Path) -> bytes:
    """Of what is no white space and no byte order mark."""
    with path.open("rb") as stream:
        while block := stream.read(4096):
            if found := block.removeprefix(BOM_UTF8).strip():
                return found[:1]
    return b""


def _read_lines(path: Path) -> Iterator[RawRecord | Problem]:
    with path.open("rb") as stream:
        for number in count(1):
            raw = stream.readline(_LONGEST_LINE)
            if not raw:
                return
            if len(raw) == _LONGEST_LINE:
                yield Problem(number, f"longer than {_LONGEST_LINE >> 20} MB: is this JSON lines?")
                return
            if number == 1:
                raw = raw.removeprefix(BOM_UTF8)
            if not raw.strip():
                continue
            try:
                yield RawRecord(number, json.loads(raw.decode("utf-8"), parse_constant=no_constant))
            except UnicodeDecodeError as error:
                yield Problem(number, NOT_UTF8.format(raw[error.start]))
            except json.JSONDecodeError as error:
                if number == 1 and path.suffix.lower() == ".json":
                    yield Problem(1, "neither a list of records, [{...}, {...}], nor one record a line")
                    return
                hint = "; one record a line, nothing behind it" if error.msg == "Extra data" else ""
                yield Problem(number, f"not JSON: {error.msg} (column {error.colno}){hint}")
            except (ValueError, RecursionError) as error:
                yield Problem(number, f"not JSON: {error}")
