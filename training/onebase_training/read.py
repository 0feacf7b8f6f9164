"""Dataset files -> records with their line numbers, one at a time. Knows files, not formats' meaning.

JSON lines are read one by one, a JSON list element by element, a `.txt` file chunk by chunk: files larger than memory
stream through. A broken line becomes a `Problem`, never an exception: the caller reports them all.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from onebase.errors import DatasetError
from onebase_training.config import DataConfig, Source
from onebase_training.text_stream import NOT_UTF8, BadText, chunks, json_list, no_constant, text_blocks

_LONGEST_LINE: Final = 64 << 20
"""Bytes. A longer one can only be another kind of file, and would have to be held whole."""


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


def locate(source: Source, folder: Path) -> Path | None:
    """The source's file, or None for a hub dataset. Raises DatasetError when it is neither."""
    try:
        given = Path(source.path).expanduser()
        for candidate in (folder / given, given):
            if candidate.is_file():
                return candidate
    except (OSError, RuntimeError) as error:  # no permission, a name too long, ~nobody
        raise DatasetError(source.path, [f"can't be read: {error}"]) from error
    looks_like_hub = source.path.count("/") == 1 and not given.suffix and not source.path.startswith(("/", ".", "~"))
    if looks_like_hub:
        return None
    raise DatasetError(source.path, [f"no such file (looked in {folder.resolve()} and {Path.cwd()})"])


def read_records(source: Source, folder: Path, config: DataConfig) -> Iterator[RawRecord | Problem]:
    """All records of a source in order."""
    path = locate(source, folder)
    if path is None:
        yield from _read_hub(source)
        return
    empty = True
    for record in _read_file(path, source, config):
        empty = False
        yield record
    if empty:
        yield Problem(1, "the file holds no record", is_record=False)


def _read_file(path: Path, source: Source, config: DataConfig) -> Iterator[RawRecord | Problem]:
    try:
        if source.format == "text" or path.suffix.lower() in (".txt", ".md"):
            for line, chunk in chunks(text_blocks(path), config.chunk_chars, config.chunk_overlap):
                yield RawRecord(line, {"text": config.chunk_prefix + chunk})
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


def _read_hub(source: Source) -> Iterator[RawRecord | Problem]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DatasetError(source.path, ["no such file; to read it from the hub: pip install datasets"]) from None
    try:
        rows = datasets.load_dataset(source.path, split=source.split, streaming=True)
    except (OSError, ValueError) as error:
        raise DatasetError(source.path, [f"neither a file nor a readable hub dataset: {error}"]) from error
    for number, row in enumerate(rows, 1):
        yield RawRecord(number, _plain(row))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}
