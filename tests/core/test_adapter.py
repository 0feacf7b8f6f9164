"""What an adapter folder may hold, and that everything wrong with it is said at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onebase.adapter import AdapterFiles, BaseIdentity, LoraConfigData, Manifest, digest, validate_adapter
from onebase.errors import AdapterInvalid, InvalidInput
from sample_adapters import BASE, SHAPES, config, key, tensors, write_adapter

Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


def problems(folder: Path, base: BaseIdentity | None = BASE, **options: Any) -> tuple[str, ...]:
    with pytest.raises(AdapterInvalid) as caught:
        validate_adapter(AdapterFiles.read(folder), SHAPES, base, **options)
    return caught.value.problems


def write_manifest(folder: Path, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "format_version": 1,
        "name": "a",
        "version": 1,
        "base": BASE.model_dump(),
        "created_at": 1,
        "weights_sha256": "0" * 64,
        "config_sha256": "0" * 64,
    }
    (folder / "onebase.json").write_text(json.dumps(fields | changes))


def test_a_folder_that_peft_writes_is_sound(tmp_path: Path) -> None:
    files = AdapterFiles.read(write_adapter(tmp_path))
    validate_adapter(files, SHAPES, BASE)
    assert files.manifest is None
    assert set(files.modules()) == {module for module in SHAPES if module.endswith(("q_proj", "v_proj"))}
    assert files.modules()[Q0]["A"].shape == (4, 8)
    assert files.config.scaling(Q0) == 2.0


def test_ranks_may_differ_between_layers(tmp_path: Path) -> None:
    weights = tensors() | {key(Q0, "A"): np.ones((2, 8), "f4"), key(Q0, "B"): np.ones((8, 2), "f4")}
    settings = config(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"layers.0.*q_proj": 32})
    files = AdapterFiles.read(write_adapter(tmp_path, weights, settings))
    validate_adapter(files, SHAPES, BASE)
    assert (files.config.scaling(Q0), files.config.scaling(V1)) == (16.0, 2.0)


def test_half_precision_is_served(tmp_path: Path) -> None:
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors().items()}
    validate_adapter(AdapterFiles.read(write_adapter(tmp_path, halves)), SHAPES, BASE)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    weights = tensors()
    del weights[key(V1, "B")]
    weights[key(Q0, "A")] = np.ones((4, 9), "f4")
    weights[key("model.layers.0.self_attn.k_proj", "A")] = np.ones((3, 8), "f4")
    weights[key("model.layers.0.self_attn.k_proj", "B")] = np.ones((4, 3), "f8")
    weights[key("model.layers.7.self_attn.q_proj", "A")] = np.ones((4, 8), "f4")
    weights["base_model.model.lm_head.weight"] = np.ones((2, 2), "f4")
    weights["base_model.model.model.embed_tokens.weight"] = np.ones((2, 2), "f4")
    weights["something.else"] = np.ones((1,), "f4")
    settings = config(
        bias="all", use_dora=True, modules_to_save=["lm_head"], base_model_name_or_path="other/model", peft_type="IA3"
    )
    found = problems(write_adapter(tmp_path, weights, settings))
    for part in [
        "use_dora: DoRA",
        "modules_to_save",
        "peft_type is 'IA3'",
        "bias is 'all'",
        "names other/model as its base",
        "'base_model.model.lm_head.weight' changes the embedding or lm_head",
        "'base_model.model.model.embed_tokens.weight' changes the embedding or lm_head",
        "'something.else' is no LoRA tensor",
        f"{Q0}: lora_A has shape [4, 9], expected [4, 8] (rank 4)",
        "model.layers.0.self_attn.k_proj: lora_A has shape [3, 8], expected [4, 8] (rank 4)",
        "model.layers.0.self_attn.k_proj: lora_B has dtype F64",
        "model.layers.0.self_attn.k_proj: target_modules does not name it",
        "model.layers.7.self_attn.q_proj: the base has no such linear layer",
        f"{V1}: lora_B is missing",
    ]:
        assert any(part in problem for problem in found), part


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "a newer one"])
def test_an_init_that_changes_the_base_is_refused_with_the_way_out(tmp_path: Path, init: str) -> None:
    (found,) = problems(write_adapter(tmp_path, settings=config(init_lora_weights=init)))
    assert "path_initial_model_for_weight_conversion" in found


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_init_that_keeps_the_base_is_served(tmp_path: Path, init: object) -> None:
    validate_adapter(AdapterFiles.read(write_adapter(tmp_path, settings=config(init_lora_weights=init))), SHAPES, BASE)


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_bias": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": ["x"]},
        {"trainable_token_indices": [1]},
        {"task_type": "SEQ_CLS"},
        {"bias": "lora_only"},
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(tmp_path: Path, setting: dict[str, object]) -> None:
    (found,) = problems(write_adapter(tmp_path, settings=config(**setting)))
    assert next(iter(setting)) in found


def test_dora_magnitudes_are_recognised(tmp_path: Path) -> None:
    weights = tensors() | {f"base_model.model.{Q0}.lora_magnitude_vector": np.ones((8,), "f4")}
    (found,) = problems(write_adapter(tmp_path, weights))
    assert "DoRA" in found


def test_keys_of_a_newer_peft_are_kept(tmp_path: Path) -> None:
    files = AdapterFiles.read(write_adapter(tmp_path, settings=config(some_new_key={"a": [1]})))
    validate_adapter(files, SHAPES, BASE)
    assert files.config.raw["some_new_key"] == {"a": [1]}


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterInvalid, match=r"pickle.*save_pretrained"):
        AdapterFiles.read(folder)


def test_missing_and_broken_files_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        AdapterFiles.read(tmp_path)
    assert caught.value.problems == ("adapter_config.json is missing", "adapter_model.safetensors is missing")
    with pytest.raises(AdapterInvalid, match="not a folder"):
        AdapterFiles.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"r": 0}', "r must be"),
        ('{"r": true}', "r must be"),
        ('{"lora_alpha": NaN}', "lora_alpha must be"),
        ('{"target_modules": 3}', "target_modules must be"),
        ('{"rank_pattern": ["q_proj"]}', "rank_pattern must be"),
        ('{"rank_pattern": {"q_proj": 0}}', "rank_pattern.*wrong value"),
        ('{"rank_pattern": {"(": 1}}', "not a pattern"),
        ('{"rank_pattern": {"(a+)+": 1}}', "too complex"),
        ('{"alpha_pattern": {"(a|a)*b": 1}}', "too complex"),
        ('{"alpha_pattern": {".*.*.*.*b": 1}}', "too complex"),
    ],
)
def test_a_broken_config_names_its_field(tmp_path: Path, text: str, message: str) -> None:
    (write_adapter(tmp_path) / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterInvalid, match=message):
        AdapterFiles.read(tmp_path)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert LoraConfigData.parse(config(r=16, lora_alpha=32, use_rslora=True)).scaling(Q0) == 8.0


def test_another_base_is_refused_by_its_manifest(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    write_manifest(folder, base=BASE.model_dump() | {"config_hash": "bb" * 32})
    (found,) = problems(folder)
    assert "was trained on base someone/tiny" in found
    validate_adapter(AdapterFiles.read(folder), SHAPES, BASE, same_base=True)


def test_a_fine_tuned_sister_of_the_base_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    write_manifest(folder, base=BASE.model_dump() | {"id": "someone/tiny-chat"})
    assert "someone/tiny-chat" in problems(folder)[0]


@pytest.mark.parametrize("name", [None, "", "/data/models/x", "./x", "unsloth/tiny-bnb-4bit", "Someone/Tiny-hf"])
def test_a_name_that_may_be_this_base_is_left_to_the_shapes(tmp_path: Path, name: str | None) -> None:
    folder = write_adapter(tmp_path, settings=config(base_model_name_or_path=name))
    validate_adapter(AdapterFiles.read(folder), SHAPES, BASE)


def test_the_digest_follows_the_content_only(tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b")
    write_manifest(second)
    assert digest(first) == digest(second)
    assert digest(write_adapter(tmp_path / "c", tensors(seed=1))) != digest(first)
    assert digest(write_adapter(tmp_path / "d", settings=config(lora_alpha=9))) != digest(first)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format_version": 2}, "format_version"),
        ({"version": 0}, "version"),
        ({"version": "1"}, "version"),
        ({"prompt_format": "alpaca"}, "prompt_format"),
        ({"weights_sha256": "x"}, "weights_sha256"),
        ({"surprise": 1}, "surprise"),
        ({"base": {}}, "base.id"),
    ],
)
def test_a_manifest_is_strict(tmp_path: Path, change: dict[str, object], field: str) -> None:
    write_manifest(tmp_path, **change)
    with pytest.raises(InvalidInput, match=field):
        Manifest.read(tmp_path / "onebase.json")
