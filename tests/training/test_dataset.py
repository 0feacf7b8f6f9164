"""Files become rows: every broken line is told, nothing is lost silently, and the same rows are held out each time."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onebase.errors import DatasetError
from onebase.tokenizer import TextTokenizer
from onebase_training.config import Recipe, make_recipe
from onebase_training.dataset import Dataset, load_dataset
from onebase_training.plan import micro_batches
from onebase_training.read import Problem, RawRecord, read_records
from onebase_training.rows import Encoder, Row, cut_to_turns
from tiny_base import CONVERSATIONS, sharegpt_file


def load(path: Path, encoder: Encoder, context: int = 2048, loss: str = "response", **data: Any) -> Dataset:
    recipe = make_recipe({"name": "x", "data": {"train": str(path), **data}, "train": {"loss": loss}})
    return load_dataset(recipe, encoder, context)


def load_dataset_rows(recipe: Recipe, encoder: Encoder) -> list[Row]:
    return [row for row, _ in load_dataset(recipe, encoder, 2048).train]


def chat_line(question: str, answer: str) -> str:
    return json.dumps({"prompt": question, "completion": answer})


def keys(rows: list[Row]) -> set[bytes]:
    return {row.key for row in rows}


def test_every_broken_line_is_told_with_its_number(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(
        '{"prompt": "a", "completion": "b"}\nnot json\n\n{"messages": []}\n{"prompt": NaN, "completion": "x"}\n'
    )

    with pytest.raises(DatasetError) as caught:
        load(file, encoder)

    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 2", "line 4", "line 5"]


def test_broken_lines_of_several_files_are_told_together(tmp_path: Path, encoder: Encoder) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{\n")
    recipe = make_recipe({"name": "x", "data": {"train": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]}})

    with pytest.raises(DatasetError) as caught:
        load_dataset(recipe, encoder, 100)

    assert [Path(problem.split(" line")[0]).name for problem in caught.value.problems] == ["a.jsonl", "b.jsonl"]


def test_a_json_list_counts_lines_too_and_stops_at_the_syntax_error(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text('[\n {"text": "a"},\n\n {"text": "b"},\n {"text": }\n]')
    config = make_recipe({"name": "x", "data": {"train": str(file)}}).data

    found = list(read_records(config.train[0], tmp_path, config))

    assert [record.line for record in found if isinstance(record, RawRecord)] == [2, 4]
    assert [str(problem).startswith("line 5: not JSON") for problem in found if isinstance(problem, Problem)] == [True]


def test_a_file_that_is_not_utf8_names_the_line(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')

    with pytest.raises(DatasetError, match="line 2: not UTF-8"):
        load(file, encoder)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + chat_line("a", "b").encode())

    assert len(load(file, encoder, eval_fraction=0).train) == 1


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        load(tmp_path / "none.jsonl", encoder)


def test_exact_duplicates_are_left_out_and_counted(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([chat_line("a", "b"), chat_line("a", "c"), chat_line("a", "b")]))

    dataset = load(file, encoder, eval_fraction=0)

    assert len(dataset.train) == 2
    assert dataset.notices == [f"{file}: 1 of 3 records left out as exact duplicates"]
    assert len(load(file, encoder, eval_fraction=0, deduplicate=False).train) == 3


def test_the_same_rows_are_held_out_whatever_the_order_and_the_loss(tmp_path: Path, encoder: Encoder) -> None:
    one = load(sharegpt_file(tmp_path / "a.jsonl"), encoder)
    other = load(sharegpt_file(tmp_path / "b.jsonl", CONVERSATIONS[::-1]), encoder, loss="all")

    assert len(one.eval) == round(0.1 * len(CONVERSATIONS))
    assert keys(one.eval) == keys(other.eval)
    assert not keys(one.eval) & {row.key for row, _ in one.train}


def test_pitfall_8_a_row_with_nothing_left_to_learn_is_left_out_and_told(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(chat_line("long " * 100, "b") + "\n" + chat_line("a", "b"))

    for policy, word in (
        ("drop", "longer than 60"),
        ("truncate", "not even one whole answer"),
        ("cut", "nothing to learn"),
    ):
        dataset = load(file, encoder, max_tokens=60, too_long=policy, eval_fraction=0)
        assert len(dataset.train) == 1
        assert word in " ".join(dataset.notices)


@pytest.mark.parametrize("policy", ["drop", "truncate", "cut"])
def test_pitfall_22_packing_puts_no_row_longer_than_max_tokens_into_a_micro_batch(
    tmp_path: Path, encoder: Encoder, policy: str
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(chat_line("word " * n, "b " * n) for n in range(1, 60)))

    dataset = load(file, encoder, max_tokens=64, too_long=policy)

    rows = [row for row, _ in dataset.train]
    assert rows
    assert dataset.eval
    assert max(len(row) for row in [*rows, *dataset.eval]) <= 64
    sizes = [sum(len(rows[i]) for i in group) for group in micro_batches(rows, 128, packing=True)]
    assert 64 < max(sizes) <= 128, "rows share micro-batches, and none outgrows its own"


def test_too_long_can_be_an_error_with_the_line(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(chat_line("a", "b") + "\n" + chat_line("long " * 100, "b"))

    with pytest.raises(DatasetError, match=r"line 2: \d+ tokens, more than max_tokens = 60"):
        load(file, encoder, max_tokens=60, too_long="error")


@pytest.mark.parametrize("limit", range(8, 90, 3))
def test_truncating_never_takes_an_answers_eos(
    encoder: Encoder, legacy: TextTokenizer, limit: int, tmp_path: Path
) -> None:
    dataset = load(sharegpt_file(tmp_path / "d.jsonl", CONVERSATIONS[:1]), encoder, eval_fraction=0)
    row = dataset.train[0][0]

    cut = cut_to_turns(row, limit)

    if cut is not None:
        assert len(cut) <= limit
        assert cut.ids[-1] == legacy.eos_id
        assert all(cut.ids[end - 1] == legacy.eos_id for _, end in cut.answers())
    else:
        first_end = row.answers()[0][1]
        assert first_end > limit


def test_every_learnt_token_belongs_to_an_answer_and_the_last_is_eos(
    tmp_path: Path, encoder: Encoder, legacy: TextTokenizer
) -> None:
    row = load(sharegpt_file(tmp_path / "d.jsonl", CONVERSATIONS[:1]), encoder, eval_fraction=0).train[0][0]

    texts = [legacy.decode(row.ids[a : b - 1].tolist()) for a, b in row.answers()]

    assert texts == [text for who, text in CONVERSATIONS[0] if who == "gpt"]
    assert all(row.ids[end - 1] == legacy.eos_id for _, end in row.answers())


def test_pitfall_23_the_blank_line_behind_eos_is_in_the_context_and_not_learnt(
    tmp_path: Path, encoder: Encoder, legacy: TextTokenizer
) -> None:
    row = load(sharegpt_file(tmp_path / "d.jsonl", CONVERSATIONS[:1]), encoder, eval_fraction=0).train[0][0]
    behind = [end for _, end in row.answers()]

    assert all(not row.learnt[end] and legacy.decode(row.ids[end : end + 2].tolist()) == "\n\n" for end in behind)


def test_the_seeds_loss_learns_every_token_but_the_first(tmp_path: Path, encoder: Encoder) -> None:
    row = load(sharegpt_file(tmp_path / "d.jsonl"), encoder, loss="all").train[0][0]

    assert np.flatnonzero(~row.learnt).tolist() == [0]


def test_text_files_are_cut_in_overlapping_chunks_with_the_prefix(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("0123456789", encoding="utf-8")
    config = make_recipe(
        {"name": "x", "data": {"train": str(file), "chunk_chars": 4, "chunk_overlap": 1, "chunk_prefix": ">"}}
    ).data

    found = [r.value["text"] for r in read_records(config.train[0], tmp_path, config) if isinstance(r, RawRecord)]  # type: ignore[index]

    assert found == [">0123", ">3456", ">6789", ">9"]


def test_a_hub_dataset_is_read_as_a_stream(monkeypatch: pytest.MonkeyPatch, encoder: Encoder, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        return iter([{"prompt": "a", "completion": "b", "extra": None}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    recipe = make_recipe({"name": "x", "data": {"train": {"path": "owner/name", "split": "test"}, "eval_fraction": 0}})

    assert len(load_dataset_rows(recipe, encoder)) == 1
    assert asked == [("owner/name", "test", True)]


def test_without_the_package_a_hub_dataset_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, encoder: Encoder
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(DatasetError, match="pip install datasets"):
        load_dataset_rows(make_recipe({"name": "x", "data": {"train": "owner/name"}}), encoder)


def test_a_long_text_without_turns_is_cut_at_the_limit_and_told(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"text": "long " * 100}))

    dataset = load(file, encoder, max_tokens=60, eval_fraction=0)

    assert [len(row) for row, _ in dataset.train] == [60]
    assert dataset.notices == [f"{file}: 1 of 1 records cut at 60 tokens"]
