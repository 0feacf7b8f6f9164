"""Dataset files -> records with their line numbers, one at a time. Knows files, not formats' meaning.

JSONL is read line by line, so files larger than memory stream through; a JSON list is decoded element by element;
a `.txt` file is cut into chunks. A broken line becomes a `Problem`, never an exception: the caller reports them all.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase.errors import DatasetError
from onebase_training.config import DataConfig, Source


@dataclass(frozen=True, slots=True)
class RawRecord:
    line: int
    """Where the record starts, from 1; the record's number for hub datasets."""
    value: object


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def locate(source: Source, folder: Path) -> Path | None:
    """The source's file, or None for a hub dataset. Raises DatasetError when it is neither."""
    given = Path(source.path).expanduser()
    for candidate in (folder / given, given):
        if candidate.is_file():
            return candidate
    looks_like_hub = source.path.count("/") == 1 and not given.suffix and not source.path.startswith(("/", ".", "~"))
    if looks_like_hub:
        return None
    raise DatasetError(source.path, [f"no such file (looked in {folder.resolve()} and {Path.cwd()})"])


def read_records(source: Source, folder: Path, config: DataConfig) -> Iterator[RawRecord | Problem]:
    """All records of a source in order."""
    path = locate(source, folder)
    if path is None:
        yield from _read_hub(source)
    elif source.format == "text" or path.suffix.lower() in (".txt", ".md"):
        yield from _read_text(path, config)
    elif path.suffix.lower() == ".json":
        yield from _read_json(path)
    else:
        yield from _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[RawRecord | Problem]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                yield RawRecord(number, json.loads(raw.decode("utf-8"), parse_constant=_no_constant))
            except UnicodeDecodeError as error:
                yield Problem(number, f"not UTF-8 (byte {error.start})")
            except json.JSONDecodeError as error:
                yield Problem(number, f"not JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:
                yield Problem(number, f"not JSON: {error}")


def _read_json(path: Path) -> Iterator[RawRecord | Problem]:
    """A list of records; or, under a .json name, JSON lines after all."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Problem(1, f"not UTF-8 (byte {error.start})")
        return
    position = len(text) - len(text.lstrip())
    if text[position : position + 1] != "[":
        yield from _read_jsonl(path)
        return
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    position, line, counted = position + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # Behind a syntax error, where the next record starts is anyone's guess.
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield Problem(at, f"not JSON: {getattr(error, 'msg', error)}")
            return
        yield RawRecord(line, value)


def _read_text(path: Path, config: DataConfig) -> Iterator[RawRecord | Problem]:
    """Chunks of `chunk_chars` characters, each `chunk_overlap` into the one before, with the prefix in front."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        yield Problem(1, f"not UTF-8 (byte {error.start})")
        return
    step = config.chunk_chars - config.chunk_overlap
    for start in range(0, len(text), step):
        chunk = text[start : start + config.chunk_chars]
        yield RawRecord(text.count("\n", 0, start) + 1, {"text": config.chunk_prefix + chunk})


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


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
