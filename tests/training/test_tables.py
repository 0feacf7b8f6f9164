"""What is no JSON and no text: the hub's datasets, saved folders, CSV and Parquet. The hub is a stand-in here."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from onebase.errors import DatasetError
from onebase_training.config import make_recipe
from onebase_training.raw_record import Problem, RawRecord
from onebase_training.read import read_records
from onebase_training.records import Conversation, parse_record

ROW = {"prompt": "a", "completion": "b", "extra": None}


def read(source: dict[str, Any] | str, folder: Path = Path()) -> tuple[list[Any], list[str]]:
    config = make_recipe({"name": "x", "data": {"train": source}}).data
    found = list(read_records(config.train[0], folder, config))
    return (
        [record.value for record in found if isinstance(record, RawRecord)],
        [str(problem) for problem in found if isinstance(problem, Problem)],
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """A `datasets` package whose load_dataset gives `rows` or raises `error`; what it was asked for is kept."""

    def install(rows: list[Any] | None = None, error: Exception | None = None) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        def load_dataset(name: str, subset: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
            asked.append((name, subset, split, revision, streaming))
            return stream()

        def stream() -> Iterator[Any]:
            yield from rows or []
            if error is not None:
                raise error

        package = SimpleNamespace(load_dataset=load_dataset, load_from_disk=lambda _: {"train": rows})
        monkeypatch.setitem(sys.modules, "datasets", package)
        return asked

    return install


def test_a_hub_dataset_is_streamed_by_its_subset_split_and_revision(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub([ROW])

    records, _ = read({"path": "owner/name.v2", "split": "test", "subset": "en", "revision": "abc"})

    assert records == [{"prompt": "a", "completion": "b"}]
    assert asked == [("owner/name.v2", "en", "test", "abc", True)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    read("owner/name")
    assert asked[1] == ("owner/name", None, "train", None, False)


def test_columns_take_our_names(hub: Any, tmp_path: Path) -> None:
    hub([{"q": "a", "a": "b", "prompt": "not this"}])

    assert read({"path": "owner/name", "columns": {"prompt": "q", "completion": "a"}})[0] == [
        {"prompt": "a", "completion": "b"}
    ]
    (tmp_path / "d.jsonl").write_text('{"q": "a"}')
    assert read({"path": str(tmp_path / "d.jsonl"), "columns": {"text": "q"}})[0] == [{"text": "a"}]


def test_a_column_of_turns_may_be_a_table_itself(hub: Any) -> None:
    hub([{"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Ho"]}}])

    assert read("owner/name")[0] == [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    ]


class GatedRepoError(OSError):
    pass


class DatasetNotFoundError(FileNotFoundError):
    pass


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (GatedRepoError("403"), "is gated: agree to its terms on https://huggingface.co/datasets/owner/name, then"),
        (DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), "is gated"),
        (DatasetNotFoundError("doesn't exist"), "neither a file nor a hub dataset that can be seen with this login"),
        (ConnectionError("Couldn't reach it"), "the hub can't be reached. Load it once where there is a network"),
        (ValueError("Unknown split 'x'. Should be one of ['train']."), "can't be read: Unknown split 'x'"),
        (RuntimeError("Dataset scripts are no longer supported"), "can't be read: Dataset scripts"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(hub: Any, error: Exception, word: str) -> None:
    hub(error=error)
    with pytest.raises(DatasetError) as caught:
        read("owner/name")
    assert word in caught.value.message

    hub([ROW, ROW], error)
    with pytest.raises(DatasetError, match="broke off behind record 2"):
        read("owner/name")


def test_without_the_package_a_hub_dataset_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(DatasetError, match="pip install datasets"):
        read("owner/name")


@pytest.mark.parametrize("path", ["owner/name.jsonl", "./owner/name", "/no/such", "a/b/c", "nothing", "x" * 5000])
def test_what_can_be_no_hub_id_is_a_missing_file(path: str) -> None:
    with pytest.raises(DatasetError, match=r"no such file|can't be read"):
        read(path)


def test_a_folder_that_datasets_saved_is_read_and_another_one_is_refused(hub: Any, tmp_path: Path) -> None:
    hub([ROW])
    (tmp_path / "dataset_dict.json").touch()

    assert read(str(tmp_path))[0] == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(DatasetError, match="no split 'test'; there are train"):
        read({"path": str(tmp_path), "split": "test"})
    (tmp_path / "dataset_dict.json").rename(tmp_path / "part-1.jsonl")
    with pytest.raises(DatasetError, match=r"is a folder that .* did not write; name its files \(part-1.jsonl\)"):
        read(str(tmp_path))


def test_a_csv_file_is_read_by_its_first_line(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_bytes('\ufeffinstruction,input,output\r\n"a, b","x\ny",c\r\nd,,e,f\r\ng,h,i\r\n'.encode())

    records, problems = read(str(file))

    assert records == [
        {"instruction": "a, b", "input": "x\ny", "output": "c"},
        {"instruction": "g", "input": "h", "output": "i"},
    ]
    assert problems == ["line 4: more fields than the 3 of the first line"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'text\n"a\n', "line 2: not CSV: unexpected end of data"),
        (b"text\na\n\xff\n", "not UTF-8"),
        (b"", "line 1: the file holds no record"),
        (b"text\n", "line 1: the file holds no record"),
    ],
)
def test_a_broken_csv_file_says_where(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "d.csv").write_bytes(content)

    assert problem in read(str(tmp_path / "d.csv"))[1][0]


def test_a_tsv_file_has_tabs(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("prompt\tcompletion\na,b\tc\n")

    assert read(str(tmp_path / "d.tsv"))[0] == [{"prompt": "a,b", "completion": "c"}]


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").touch()

    with pytest.raises(DatasetError, match="pip install pyarrow"):
        read(str(tmp_path / "d.parquet"))


def parquet(path: Path, rows: int) -> Path:
    """Texts of 100 random digits, so that a page holds them as they are."""
    digits = random.Random(0)
    talks = [
        [{"from": "human", "value": f"{digits.getrandbits(400):0100x}"}, {"from": "gpt", "value": "yes"}]
        for _ in range(rows)
    ]
    pyarrow.parquet.write_table(pyarrow.table({"conversations": talks, "note": [None] * rows}), path)
    return path


def test_a_parquet_file_is_read_row_by_row_with_its_nested_turns(tmp_path: Path) -> None:
    file = parquet(tmp_path / "d.parquet", 150)

    records, problems = read(str(file))

    assert problems == []
    assert len(records) == 150  # more than are read at once
    parsed = parse_record(records[149], "auto")
    assert isinstance(parsed, Conversation)
    assert [message.role for message in parsed.messages] == ["user", "assistant"]
    assert "note" not in records[0]


def test_a_broken_parquet_file_says_so(tmp_path: Path) -> None:
    file = parquet(tmp_path / "d.parquet", 150)
    whole = file.read_bytes()
    middle = len(whole) // 2
    for broken in (b"", b"text", whole[:-10], whole[:middle] + b"\xff" * 2000 + whole[middle + 2000 :]):
        file.write_bytes(broken)
        with pytest.raises(DatasetError, match=r"not a Parquet file, or broken behind row 0: \w"):
            read(str(file))
