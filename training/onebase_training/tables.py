"""CSV and Parquet files, row by row. A row is a record whose columns are its keys."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from onebase.errors import DatasetError
from onebase_training.raw_record import Problem, RawRecord, plain

_LARGEST_FIELD: Final = 64 << 20
_AT_ONCE: Final = 64
"""Rows of a Parquet file that are in memory together."""


def csv_rows(path: Path) -> Iterator[RawRecord | Problem]:
    """A file with a header line; tabs part the fields of a .tsv. A syntax error ends the reading."""
    csv.field_size_limit(_LARGEST_FIELD)  # the library's own is 128 kB
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        line = 1
        try:
            fields = len(rows.fieldnames or ())
            while True:
                line = rows.line_num + 1
                row = next(rows, None)
                if row is None:
                    return
                if None in row:
                    yield Problem(line, f"more fields than the {fields} of the first line")
                else:
                    yield RawRecord(line, plain(row))
        except csv.Error as error:
            yield Problem(line, f"not CSV: {error}")
        except UnicodeDecodeError as error:
            yield Problem(line, f"not UTF-8 on this line or soon behind it (byte 0x{error.object[error.start]:02x})")


def parquet_rows(path: Path, name: str) -> Iterator[RawRecord]:
    """Numbered from 1. Raises DatasetError without pyarrow, and for a file that is none."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DatasetError(name, ["to read Parquet: pip install pyarrow (or datasets)"]) from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRecord(number, plain(row))
    except (ArrowException, OSError) as error:  # what can't be unpacked is an OSError without a system's words
        raise DatasetError(name, [f"not a Parquet file, or broken behind row {number}: {error}"]) from error
