"""A recipe may hold anything: it becomes a run's settings, or an error that says which key, in no time."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.errors import RecipeError
from onebase_training.config import load_recipe, make_recipe
from onebase_training.recipe_file import parse_yaml
from sample_recipes import MINIMAL, refusal, seed_config

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, "more than 100,000 values, references counted in full"),
        (MERGE_BOMB, "more than 100,000 values, references counted in full"),
        ("name: &a [*a]", "line 1: a value that refers to itself"),
        ("name: x\nname: y", "line 2: the key 'name' stands twice in its section"),
        ("data:\n  train: a\n  train: b", "line 3: the key 'train' stands twice"),
        ("x: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("x: " + "[" * 100_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: a value of type python/object/apply:os.system"),
        ("a: !!python/name:os.system", "a value of type python/name:os.system"),
        ("a: !mine x", "a value of type !mine, which no key takes"),
        ("a: 2024-01-01", "a value of type timestamp, which no key takes; put it in quotes"),
        ('a: !!int ""', "a value is not what its tag says"),
        ("a: !!bool perhaps", "a value is not what its tag says"),
        ("a: " + "9" * 5000, "a value is not what its tag says"),
        ("1: x", "line 1: the key '1' is no word; put it in quotes"),
        ("[a]: x", "line 1: the key"),
        ("on: x", "line 1: the key 'on' is no word; put it in quotes"),
        ("- a", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("a: b\n---\nc: d", "is not YAML"),
        ("a: \x00", "is not YAML"),
    ],
)
def test_yaml_that_is_no_recipe_is_told_with_its_line(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "r.yaml").write_text(text)

    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")

    assert word in caught.value.message
    assert len(caught.value.message) < 1000


def test_references_and_merges_of_a_sensible_size_work() -> None:
    text = "base: &b {r: 4, alpha: 8}\nlora: {<<: *b, r: 16}\nagain: [*b, *b]"

    assert parse_yaml(text, "r")["lora"] == {"r": 16, "alpha": 8}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"name: \xff", "line 1: not UTF-8"),
        (b"a: b\nname: \xff", "line 2: not UTF-8"),
        (b"a: b\n" * 1_000_000, "larger than 4 MB"),
    ],
)
def test_a_file_that_is_no_text_or_no_page_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)

    with pytest.raises(RecipeError, match=word):
        load_recipe(tmp_path / "r.yaml")


def test_a_link_is_followed_and_a_ring_of_links_or_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(MINIMAL))
    (tmp_path / "link.yaml").symlink_to(tmp_path / "r.yaml")
    (tmp_path / "ring.yaml").symlink_to(tmp_path / "ring.yaml")
    (tmp_path / "folder.yaml").mkdir()

    assert load_recipe(tmp_path / "link.yaml").name == "captain"
    for name in ("ring", "folder"):
        with pytest.raises(RecipeError, match="can't read the recipe"):
            load_recipe(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.learning_rate", float("nan")),
        ("train.learning_rate", float("inf")),
        ("train.learning_rate", -1),
        ("train.weight_decay", float("inf")),
        ("train.warmup", float("inf")),
        ("train.epochs", 0),
        ("train.epochs", -3),
        ("train.epochs", float("inf")),
        ("train.epochs", True),
        ("train.max_steps", 10**30),
        ("train.batch_size", 10**30),
        ("train.eval_every", 0),
        ("train.save_every", -1),
        ("train.tokens_at_once", 0),
        ("train.seed", -1),
        ("lora.r", 0),
        ("lora.r", True),
        ("lora.r", 8.5),
        ("lora.r", [8]),
        ("lora.alpha", float("nan")),
        ("lora.rank_pattern", {"q_proj": 0}),
        ("lora.rank_pattern", {"[": 4}),
        ("data.max_tokens", 10**12),
        ("data.chunk_chars", 10**12),
        ("data.eval_fraction", 1),
        ("data.train", 5),
        ("data.train", []),
        ("data.train", [{"path": "a", "weight": float("nan")}]),
        ("data.train", [{"path": "a", "weight": 0}]),
        ("data.headers", "x"),
        ("data", 5),
        ("lora", [1]),
        ("preset", [1]),
        ("preset", {}),
        ("name", 5),
        ("name", "../x"),
        ("compute.memory_gb", float("inf")),
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    content = {**MINIMAL, section: {**MINIMAL.get(section, {}), name: value} if name else value}

    error = refusal(content)

    assert error.message.startswith(key)
    assert str(error.param).startswith(key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.batch_size", "x"),
        ("trainer.batch_size", float("inf")),
        ("trainer.gradient_accumulation_steps", 0),
        ("trainer.warmup_steps", "x"),
        ("trainer.num_train_epochs", float("nan")),
        ("lora.lora_alpha", "x"),
        ("lora", 5),
        ("data.type", []),
        ("data.user_header", 5),
        ("data.dataset", 5),
        ("model_context_window", "x"),
        ("base_model", 5),
    ],
)
def test_a_wrong_value_in_a_seed_file_names_the_seeds_key(key: str, value: Any) -> None:
    content = seed_config()
    section, _, name = key.partition(".")
    content[section] = {**content[section], name: value} if name else value

    assert refusal(content).message.startswith(f"{key}:")


def test_text_files_of_a_seed_file_must_be_a_list() -> None:
    for files in (5, [], [5]):
        content = seed_config(type="raw_text", text_files=files, chunk_char_len=10, chunk_char_overlap=1)
        assert refusal(content).message == "data.text_files: must be a list of files"


WORDS = st.sampled_from(
    "name base preset data lora train compute eval model_name base_model trainer type dataset text_files vicuna orca "
    "raw_text path weight format seed default epochs r alpha init headers user response checks layers".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=5),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(content=st.dictionaries(WORDS, VALUES, max_size=6), whole=st.booleans())
def test_any_values_are_a_recipe_or_an_error_with_its_key(content: dict[str, Any], whole: bool) -> None:
    try:
        recipe = make_recipe({**MINIMAL, **content} if whole else content)
    except RecipeError:
        return
    assert recipe.settings()


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="ab:-[]{}&*!<,#'\"|> \n01.", max_size=60))
def test_any_text_is_values_or_an_error(text: str) -> None:
    try:
        values = parse_yaml(text, "r")
    except RecipeError:
        return
    assert isinstance(values, dict)
