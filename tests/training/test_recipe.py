"""Recipes: what is accepted, what is refused and with which words, and the seed's own YAML files as they are."""

from pathlib import Path

import pytest

from onebase.errors import RecipeError
from onebase_training.config import load_recipe, make_recipe
from sample_recipes import MINIMAL, refusal, seed_config


def test_a_name_and_a_file_are_enough() -> None:
    recipe = make_recipe(MINIMAL)

    assert recipe.base == "SmolLM2-135M-Instruct"
    assert recipe.train.loss == "response"
    assert recipe.lora.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("lora", "rank", "r"),
        ("train", "lr", "learning_rate"),
        ("train", "epoch", "epochs"),
        ("data", "max_token", "max_tokens"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(section: str, key: str, meant: str) -> None:
    content = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: 3}}

    error = refusal(content)

    assert error.message.startswith(f"{section}.{key}: unknown key; did you mean {meant}")
    assert error.param == f"{section}.{key}"


def test_all_mistakes_are_told_together() -> None:
    error = refusal({**MINIMAL, "name": "Not A Name", "train": {"epochs": "x"}, "trian": {}})

    assert all(word in error.message for word in ("name:", "train.epochs", "trian: unknown key; did you mean train?"))


def test_an_unknown_preset_lists_the_known_ones() -> None:
    assert refusal({**MINIMAL, "preset": "best"}).message == "preset: unknown preset 'best'; there are default, seed"


def test_an_overlap_as_long_as_the_chunk_is_refused_since_the_seed_looped_for_ever() -> None:
    error = refusal({**MINIMAL, "data": {"train": "a.txt", "chunk_chars": 10, "chunk_overlap": 10}})

    assert "chunk_overlap must be smaller than chunk_chars" in error.message


def test_a_file_that_is_not_yaml_or_not_there_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    for name, word in (("bad.yaml", "is not YAML"), ("none.yaml", "can't read the recipe")):
        with pytest.raises(RecipeError, match=word):
            load_recipe(tmp_path / name)


def test_own_values_win_over_the_preset_key_by_key() -> None:
    recipe = make_recipe({**MINIMAL, "preset": "seed", "lora": {"r": 32}})

    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (32, 32, 0.05)


def test_the_seeds_config_loads_as_it_is_and_means_what_it_meant() -> None:
    recipe = make_recipe(seed_config())

    assert recipe.name == "open_llama_7b_qlora_uncensored"
    assert recipe.base == "openlm-research/open_llama_7b"
    assert recipe.data.max_tokens == 2048
    assert recipe.data.too_long == "cut"
    assert (recipe.data.headers.user, recipe.data.headers.response) == ("### HUMAN:\n", "### RESPONSE:\n")  # type: ignore[union-attr]
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 32, 0.05)
    assert recipe.lora.target_modules == ("q_proj", "k_proj", "v_proj")
    train = recipe.train
    assert (train.batch_size, train.epochs, train.learning_rate, train.warmup) == (4, 1, 2e-4, 100)
    assert (train.schedule, train.max_grad_norm, train.weight_decay, train.seed) == ("linear", 1.0, 0.0, 42)
    assert (train.loss, train.packing, train.log_every, train.tensorboard) == ("all", False, 20, True)
    assert (train.save_every, train.eval_every) == (500, "never")


def test_pitfall_11_the_seeds_fp16_becomes_bf16_with_a_notice() -> None:
    recipe = make_recipe(seed_config())

    assert "float16" not in recipe.settings()["compute"].values()
    assert any("fp16" in notice for notice in recipe.notices)


def test_the_seeds_orca_config_keeps_its_headers_and_its_single_newline() -> None:
    recipe = make_recipe(
        seed_config(
            type="orca",
            dataset="Open-Orca/OpenOrca",
            system_header="### System:\n",
            instruction_header="### Instruction:\n",
            response_header="### Response:\n",
        )
    )

    assert recipe.data.train[0].format == "orca"
    assert recipe.data.headers is not None
    assert recipe.data.headers.model_dump() == {
        "system": "### System:\n",
        "user": "### Instruction:\n",
        "response": "### Response:\n",
        "after_eos": "\n",
    }


def test_the_seeds_raw_text_config_keeps_its_chunks() -> None:
    recipe = make_recipe(
        seed_config(
            type="raw_text", text_files=["a.txt", "b.txt"], chunk_char_len=100, chunk_char_overlap=20, chunk_prefix="> "
        )
    )

    assert [source.path for source in recipe.data.train] == ["a.txt", "b.txt"]
    assert (recipe.data.chunk_chars, recipe.data.chunk_overlap, recipe.data.chunk_prefix) == (100, 20, "> ")


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("data", "type"), "sharegpt", "data.type: must be one of vicuna, orca, raw_text, not 'sharegpt'"),
        (("lora", "lora_rank"), 8, "lora.lora_rank: the seed's configs have no such key"),
        (("lora", "bias"), "all", "lora.bias: only none can be served on a shared base"),
        (("trainer", "fp16"), True, "trainer.fp16: the seed's configs have no such key"),
    ],
)
def test_a_seed_config_with_a_mistake_names_the_key(path: tuple[str, str], value: object, word: str) -> None:
    content = seed_config()
    content[path[0]][path[1]] = value

    assert word in refusal(content).message
