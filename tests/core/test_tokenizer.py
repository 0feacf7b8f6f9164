"""The tokenizer's three promises, on both kinds: no forged control tokens, exact segments, exact bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile_text import texts
from onebase.errors import BaseModelError, InvalidInput
from onebase.tokenizer import TextTokenizer
from sample_tokenizers import sentencepiece_folder, smollm2_folder, train_sentencepiece


@given(text=texts)
def test_any_segment_comes_back_exactly(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.spellable(text)


@given(text=texts)
def test_joined_token_bytes_are_the_texts_bytes(tokenizer: TextTokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == tokenizer.spellable(text).encode()


@given(text=texts)
def test_no_text_yields_a_control_token(tokenizer: TextTokenizer, text: str) -> None:
    for first in (False, True):
        assert not tokenizer.special_ids & set(tokenizer.encode(text, first))


@given(parts=st.lists(texts, max_size=5))
def test_segments_concatenate_to_the_whole_text(tokenizer: TextTokenizer, parts: list[str]) -> None:
    ids = [i for part in parts for i in tokenizer.encode(part)]
    assert tokenizer.decode(ids) == tokenizer.spellable("".join(parts))


@given(text=texts.filter(lambda text: not text.startswith((" ", "\u2581"))))
def test_a_first_segment_comes_back_without_its_dummy_space(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, first=True), first=True) == tokenizer.spellable(text)


@given(text=texts, marks=st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_trusted_text_yields_exactly_the_specials_it_spells(
    tokenizer: TextTokenizer, text: str, marks: list[bool]
) -> None:
    eos = tokenizer.token_text(tokenizer.eos_id)
    plain = text.replace("<", "(")
    spelt = "".join(f"{plain}{eos}" if mark else plain for mark in marks)
    assert tokenizer.encode_with_specials(spelt).count(tokenizer.eos_id) == sum(marks)


def test_a_very_long_text_comes_back(tokenizer: TextTokenizer) -> None:
    text = "Ein langer Text mit </s> und 😀 darin.\r\n" * 5000 + "a" * 20_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_and_code_point_kind_comes_back(tokenizer: TextTokenizer) -> None:
    text = "".join(map(chr, [*range(0x500), *range(0x2000, 0x2100), 0xD7FF, 0xE000, 0xFFFD, 0xFFFF, 0x10FFFF]))
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.spellable(text)


def test_a_character_that_the_vocabulary_lacks_shows_as_one_replacement(
    smollm2: TextTokenizer, legacy: TextTokenizer
) -> None:
    text = "a\x04b\U00040000c"
    assert smollm2.decode(smollm2.encode(text)) == smollm2.spellable(text) == "a\ufffdb\ufffdc"
    assert legacy.decode(legacy.encode(text)) == legacy.spellable(text) == text


def test_ids_equal_sentencepieces_own(legacy: TextTokenizer, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path)
    for text in ["Hello, how are you?", "two  spaces", " leading", "Köln 😀 漢字", "12 + 34 = 46", "tab\there"]:
        assert legacy.encode(text, first=True) == model.encode(text)


def test_later_segments_get_no_dummy_space(tokenizers: dict[str, TextTokenizer]) -> None:
    for name in ("legacy", "metaspace"):
        tokenizer = tokenizers[name]
        assert tokenizer.token_bytes(tokenizer.encode("Hello", first=True)[0])[:1] == b" "
        assert tokenizer.token_bytes(tokenizer.encode("Hello")[0])[:1] == b"H"
    assert tokenizers["legacy"].encode("Hello you") == tokenizers["metaspace"].encode("Hello you")


def test_special_ids_are_read_from_the_files(smollm2: TextTokenizer, legacy: TextTokenizer) -> None:
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.vocab_size) == (None, 2, 49152)
    assert (legacy.bos_id, legacy.eos_id, legacy.eos_ids) == (1, 2, frozenset({2}))


def test_an_eos_that_is_no_special_added_token_is_made_one(folders: dict[str, Path], legacy: TextTokenizer) -> None:
    spec = json.loads((folders["legacy"] / "tokenizer.json").read_text())
    assert [token["special"] for token in spec["added_tokens"] if token["content"] == "</s>"] == [False]
    assert legacy.is_special(legacy.eos_id)
    assert legacy.eos_id not in legacy.encode("a</s>b")


def test_control_tokens_have_no_text(tokenizer: TextTokenizer) -> None:
    ids = [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    assert tokenizer.token_bytes(10**9) == b""


def test_broken_utf8_decodes_to_replacement_characters(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_a_lone_surrogate_is_a_clear_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidInput, match="surrogate"):
        tokenizer.encode("a\ud800b")


def _edit(path: Path, **fields: object) -> None:
    value = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_all_eos_ids_of_the_configs_end_an_answer(tmp_path: Path) -> None:
    folder = smollm2_folder(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = TextTokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (2, frozenset({0, 2}))
    assert tokenizer.pad_id not in tokenizer.eos_ids


def test_a_pad_token_behind_the_last_row_stays_text(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    rows = len(spec["model"]["vocab"])
    grown = {**spec["added_tokens"][0], "id": rows, "content": "[PAD]", "special": False}
    _edit(folder / "tokenizer.json", added_tokens=[*spec["added_tokens"], grown])
    _edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    tokenizer = TextTokenizer.load(folder)
    assert tokenizer.pad_id < tokenizer.vocab_size == rows
    ids = tokenizer.encode("a [PAD] b")
    assert max(ids) < rows
    assert tokenizer.decode(ids) == "a [PAD] b"
    assert max(tokenizer.encode_with_specials("a [PAD] b")) < rows


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "save_pretrained"),
        ("tokenizer.json", "{", "not readable JSON"),
        ("tokenizer.json", "[]", "must hold a JSON object"),
        ("tokenizer.json", "{}", "lacks a part"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"</s>": 0}}}', "not a tokenizer"),
        ("tokenizer_config.json", "{", "not readable JSON"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = sentencepiece_folder(tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(BaseModelError, match=message) as caught:
        TextTokenizer.load(folder)
    assert file.split("_")[0] in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    _edit(folder / "config.json", eos_token_id=None)
    with pytest.raises(BaseModelError, match="no eos token"):
        TextTokenizer.load(folder)
