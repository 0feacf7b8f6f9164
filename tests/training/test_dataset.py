"""Files become rows: every broken line is told, nothing is lost silently, and the same rows are held out each time."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onebase.errors import DatasetError
from onebase.tokenizer import TextTokenizer
from onebase_training.config import Recipe, make_recipe
from onebase_training.dataset import Dataset, load_dataset
from onebase_training.plan import micro_batches
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

    assert 0 < len(one.eval) < len(CONVERSATIONS) / 2
    assert keys(one.eval) == keys(other.eval)
    assert not keys(one.eval) & {row.key for row, _ in one.train}


def chats(path: Path, *numbers: int) -> Path:
    path.write_text("".join(chat_line(f"question {n}", f"answer {n}") + "\n" for n in numbers))
    return path


def test_a_row_stays_on_its_side_of_the_split_when_others_are_added(tmp_path: Path, encoder: Encoder) -> None:
    before = load(chats(tmp_path / "a.jsonl", *range(100)), encoder, eval_fraction=0.2)
    after = load(chats(tmp_path / "b.jsonl", *range(300, 100, -1), *range(100)), encoder, eval_fraction=0.2)

    assert 10 < len(before.eval) < 30
    assert keys(before.eval) <= keys(after.eval)
    assert keys([row for row, _ in before.train]) <= keys([row for row, _ in after.train])


def test_copies_of_a_row_are_on_one_side_of_the_split(tmp_path: Path, encoder: Encoder) -> None:
    numbers = [n for n in range(60) for _ in range(3)]
    for most in (None, 1, 4, 7):
        dataset = load(
            chats(tmp_path / "d.jsonl", *numbers),
            encoder,
            deduplicate=False,
            eval_fraction=0.3,
            max_eval_rows=most,
        )
        assert len(dataset.train) + len(dataset.eval) == 180
        assert dataset.eval
        assert not keys(dataset.eval) & keys([row for row, _ in dataset.train])


def test_rows_beyond_the_most_that_are_evaluated_are_trained_on(tmp_path: Path, encoder: Encoder) -> None:
    file = chats(tmp_path / "d.jsonl", *range(2200))

    half = load(file, encoder, eval_fraction=0.6)
    few = load(file, encoder, eval_fraction=0.6, max_eval_rows=10)

    assert (len(half.train), len(half.eval)) == (1200, 1000)
    assert (len(few.train), len(few.eval)) == (2190, 10)
    assert keys(few.eval) <= keys(half.eval)


def test_ten_rows_hold_out_one_at_least_and_one_row_is_never_all_held_out(tmp_path: Path, encoder: Encoder) -> None:
    assert len(load(chats(tmp_path / "a.jsonl", *range(10)), encoder, eval_fraction=0.001).eval) == 1
    assert len(load(chats(tmp_path / "b.jsonl", *range(6)), encoder, eval_fraction=0.1).eval) == 1
    assert len(load(chats(tmp_path / "c.jsonl", 1), encoder, eval_fraction=0.99).train) == 1


def test_a_held_out_file_is_evaluated_whole_unless_told_otherwise(tmp_path: Path, encoder: Encoder) -> None:
    held_out = chats(tmp_path / "e.jsonl", *range(1200))
    file = chats(tmp_path / "d.jsonl", 5000)

    assert len(load(file, encoder, eval=str(held_out)).eval) == 1200
    cut = load(file, encoder, eval=str(held_out), max_eval_rows=7)
    assert len(cut.eval) == 7
    assert cut.notices == [f"{held_out}: 1193 of 1200 records left out of evaluations: max_eval_rows = 7"]


def test_a_long_reading_tells_how_far_it_is_every_second(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_training.dataset.monotonic", itertools.count(step=0.25).__next__)
    heard: list[str] = []
    file = tmp_path / "d.jsonl"
    file.write_text("not json\n" * 9 + chat_line("a", "b"))

    with pytest.raises(DatasetError):
        load_dataset(make_recipe({"name": "x", "data": {"train": str(file)}}), encoder, 2048, heard.append)

    assert heard == ["4 records read of d.jsonl", "8 records read of d.jsonl"]


def test_a_broken_file_that_is_held_out_too_is_told_once(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("not json\n")

    with pytest.raises(DatasetError) as caught:
        load(file, encoder, eval=str(file))

    assert caught.value.problems == ("line 1: not JSON: Expecting value (column 1)",)


def test_held_out_rows_that_are_trained_on_are_told(tmp_path: Path, encoder: Encoder) -> None:
    held_out = chats(tmp_path / "e.jsonl", 1, 2, 3)

    dataset = load(chats(tmp_path / "d.jsonl", 3, 4), encoder, eval=str(held_out))

    assert "1 of 3 records are trained on too" in dataset.notices[0]


def test_of_several_held_out_files_each_tells_its_own_counts(tmp_path: Path, encoder: Encoder) -> None:
    train, first, second = (tmp_path / f"{name}.jsonl" for name in ("train", "first", "second"))
    train.write_text("\n".join(chat_line(f"q{n}", "yes.") for n in range(10)))
    first.write_text("\n".join(chat_line(f"q{n}", "yes.") for n in range(2, 9)))
    second.write_text("\n".join(chat_line(f"other {n}", "no.") for n in range(5)))

    dataset = load(train, encoder, eval=[str(first), str(second)], max_eval_rows=4)

    told = {Path(report.path).stem: dict(report.left_out) for report in dataset.reports}
    beyond = "left out of evaluations: max_eval_rows = 4"
    assert told["train"] == {}
    assert told["first"]["are trained on too, so their loss says little of new text"] == 7
    assert set(told["second"]) == {beyond}
    assert told["first"][beyond] + told["second"][beyond] == 12 - 4
    assert told["first"][beyond] <= 7
    assert len(dataset.eval) == 4


def test_a_held_out_file_without_a_usable_row_is_an_error(tmp_path: Path, encoder: Encoder) -> None:
    held_out = tmp_path / "e.jsonl"
    held_out.write_text(chat_line("long " * 100, "b"))

    with pytest.raises(DatasetError, match="no usable record to hold out"):
        load(chats(tmp_path / "d.jsonl", 1), encoder, eval=str(held_out), max_tokens=60)


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


def test_a_long_text_without_turns_is_cut_at_the_limit_and_told(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"text": "long " * 100}))

    dataset = load(file, encoder, max_tokens=60, eval_fraction=0)

    assert [len(row) for row, _ in dataset.train] == [60]
    assert dataset.notices == [f"{file}: 1 of 1 records cut at 60 tokens"]
