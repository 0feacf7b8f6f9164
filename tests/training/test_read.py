"""Files are read to their end in memory that does not grow with them, and what is broken has its line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onebase_training.config import make_recipe
from onebase_training.raw_record import Problem, RawRecord
from onebase_training.read import read_records
from onebase_training.text_stream import chunks


def read(file: Path, content: str | bytes, **data: Any) -> tuple[list[tuple[int, Any]], list[str]]:
    """(the records with their lines, the problems as told)."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    config = make_recipe({"name": "x", "data": {"train": str(file), **data}}).data
    found = list(read_records(config.train[0], file.parent, config))
    return (
        [(record.line, record.value) for record in found if isinstance(record, RawRecord)],
        [str(problem) for problem in found if isinstance(problem, Problem)],
    )


def seed_chunks(text: str, size: int, overlap: int) -> list[str]:
    """Where the chunks of the seed's RawTextDataProcessor begin and end, as its loop gives them."""
    found, at = [], 0
    while at < len(text):
        at = max(at - overlap, 0)
        found.append(text[at : at + size])
        at += size
    return found


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_a_json_list_counts_lines_too_and_stops_at_the_syntax_error(tmp_path: Path, name: str) -> None:
    records, problems = read(tmp_path / name, '[\n {"text": "a"},\n\n {"text": "b"},\n {"text": }\n]')

    assert [line for line, _ in records] == [2, 4]
    assert problems == ["line 5: not JSON: Expecting value"]


@pytest.mark.parametrize(
    ("content", "records", "problem"),
    [
        ('[{"a": 1},\n]', 1, "line 2: not JSON: a comma with no record behind it"),
        ('[{"a": 1}\n{"b": 2}]', 1, "line 2: not JSON: a comma or ] is missing"),
        ('[{"a": 1},\n{"b": 2}', 2, "line 2: not JSON: the list has no ]"),
        ('[{"a": 1}]\n[]', 1, "line 2: not JSON: something stands behind the list"),
        ('[\n{"a": "b\n"}]', 0, "line 2: not JSON: Invalid control character at"),
        ('[\n{"a": NaN}]', 0, "line 2: not JSON: NaN is not JSON"),
        ("[\n" + "[" * 200_000, 0, "line 2: not JSON that can be read: nested too deeply"),
        ("[]", 0, "line 1: the file holds no record"),
        ("", 0, "line 1: the file holds no record"),
        (" \n", 0, "line 1: the file holds no record"),
        ('{\n "data": [{"a": 1}]\n}', 0, "line 1: neither a list of records, [{...}, {...}], nor one record a line"),
    ],
)
def test_a_json_file_that_is_wrong_says_where(tmp_path: Path, content: str, records: int, problem: str) -> None:
    found, problems = read(tmp_path / "d.json", content)

    assert len(found) == records
    assert problems == [problem]


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ('{"text": "a"},\n', ["line 1: not JSON: Extra data (column 14); one record a line, nothing behind it"]),
        ('{"text": "a",}\n', ["line 1: not JSON: "]),
        (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\nx', ["line 4: not JSON: Expecting value (column 1)"]),
        (b'{"text": "a"}\n\xff\xfe', ["line 2: not UTF-8 (byte 0xff); save the file as UTF-8"]),
        ("", ["line 1: the file holds no record"]),
    ],
)
def test_json_lines_that_are_wrong_say_where(tmp_path: Path, content: str | bytes, problems: list[str]) -> None:
    told = read(tmp_path / "d.jsonl", content)[1]

    assert len(told) == len(problems)
    assert all(text.startswith(start) for text, start in zip(told, problems, strict=True))


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    content = {"d.jsonl": '{"text": "ä"}\r\n', "d.json": '\r\n[{"text": "ä"}]\r\n', "d.txt": "ä\r\nb\r\n"}[name]

    records, problems = read(tmp_path / name, b"\xef\xbb\xbf" + content.encode())

    assert [value for _, value in records] == [{"text": "ä\nb\n" if name == "d.txt" else "ä"}]
    assert problems == []


def test_a_list_of_records_longer_than_a_block_loses_none(tmp_path: Path) -> None:
    values = [{"n": n, "text": 'ä\\"\n' * (n % 50)} for n in range(8000)] + [12345678, "x" * 3_000_000, -1e-300]

    records, problems = read(tmp_path / "d.json", json.dumps(values, indent=1, ensure_ascii=False))

    assert [value for _, value in records] == values
    assert [line for line, _ in records[:3]] == [2, 6, 10]
    assert problems == []


def test_text_files_are_cut_in_overlapping_chunks_with_the_prefix(tmp_path: Path) -> None:
    records, _ = read(tmp_path / "t.txt", "01\n3456789", chunk_chars=4, chunk_overlap=1, chunk_prefix=">")

    assert [value["text"] for _, value in records] == [">01\n3", ">3456", ">6789"]
    assert [line for line, _ in records] == [1, 2, 2]


@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (4, 1), (4, 3), (7, 0), (10, 2), (100, 99)])
def test_chunks_end_where_the_seeds_end(size: int, overlap: int) -> None:
    for length in range(30):
        text = "".join(chr(65 + n) for n in range(length))
        for block in (1, 3, 50):
            blocks = (text[at : at + block] for at in range(0, length, block))
            assert [chunk for _, chunk in chunks(blocks, size, overlap)] == seed_chunks(text, size, overlap)


def test_a_text_that_is_not_utf8_names_the_line_behind_the_first_block(tmp_path: Path) -> None:
    _, problems = read(tmp_path / "t.txt", ("ä" * 99 + "\n").encode() * 20_000 + b"\xc3\x28")

    assert problems == ["line 20001: not UTF-8 (byte 0xc3); save the file as UTF-8"]


READ_IT = """
import re, sys
from pathlib import Path
from onebase_training.config import make_recipe
from onebase_training.raw_record import RawRecord
from onebase_training.read import read_records

file = Path(sys.argv[1])
config = make_recipe({"name": "x", "data": {"train": str(file)}}).data
def peak_mb() -> float:
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024


before = peak_mb()
count = sum(isinstance(record, RawRecord) for record in read_records(config.train[0], file.parent, config))
print(count, peak_mb() - before)
"""


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_reading_takes_a_fraction_of_the_files_size(tmp_path: Path, name: str) -> None:
    file, line, lines = tmp_path / name, json.dumps({"text": "The quick brown fox. " * 200}), 12_000
    with file.open("w") as stream:
        stream.write("[" if name == "d.json" else "")
        for n in range(lines):
            stream.write(line + (",\n" if name == "d.json" and n < lines - 1 else "\n"))
        stream.write("]" if name == "d.json" else "")

    told = subprocess.run([sys.executable, "-c", READ_IT, str(file)], capture_output=True, text=True, check=True)
    count, grown = told.stdout.split()

    assert file.stat().st_size > 50e6
    assert int(count) >= lines
    assert float(grown) < 25
