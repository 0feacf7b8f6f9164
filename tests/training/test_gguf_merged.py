"""A merged GGUF, read back: by our own GGUF reader as a whole model, and by the gguf package tensor by tensor."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from onebase.base_fetch import fetch_folder
from onebase.bases import BaseSpec, resolve_base
from onebase.errors import BaseModelError, Conflict
from onebase.gguf_convert import convert_gguf
from onebase.home import Home
from onebase.tokenizer import TextTokenizer
from onebase_training.gguf_merged import write_gguf_merged
from onebase_training.merge import merge
from sample_adapters import config, key, write_adapter
from sample_tokenizers import smollm2_folder
from tiny_base import NAME

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> BaseSpec:
    """Tiny, with SmolLM2's own tokenizer and tied embedding."""
    root = tmp_path_factory.mktemp("smol")
    folder = smollm2_folder(root / "tiny-smol")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return fetch_folder(Home(root / "home").create(), folder)


@pytest.fixture
def adapter(tmp_path: Path) -> Any:
    """Of any base: q, k and down in every layer."""

    def write(spec: BaseSpec) -> Path:
        rng = np.random.default_rng(0)
        weights = {}
        for module, (out, into) in spec.linear_shapes.items():
            if module.endswith(("q_proj", "k_proj", "down_proj")):
                weights[key(module, "A")] = rng.standard_normal((4, into), dtype=np.float32)
                weights[key(module, "B")] = 0.01 * rng.standard_normal((out, 4), dtype=np.float32)
        return write_adapter(tmp_path / "adapter", weights, config(target_modules=["q_proj", "k_proj", "down_proj"]))

    return write


def test_it_reads_back_as_the_merged_model(smol: BaseSpec, adapter: Any, tmp_path: Path) -> None:
    folder = adapter(smol)
    merged = load_file(merge(folder, smol, tmp_path / "merged") / "model.safetensors")

    file = write_gguf_merged(folder, smol, tmp_path / "m.gguf", kind="bf16", name="tiny@1")

    (tmp_path / "read").mkdir()
    convert_gguf(file, tmp_path / "read")
    read = load_file(tmp_path / "read/model.safetensors")
    assert set(read) == set(merged)
    assert all(torch.equal(read[name], weight) for name, weight in merged.items())
    text = "Numbers 1234, <|im_start|> and Grüße\n\n  x"
    own, back = TextTokenizer.load(smol.path), TextTokenizer.load(tmp_path / "read")
    assert back.encode(text) == own.encode(text)
    assert (back.bos_id, back.eos_ids, back.vocab_size) == (own.bos_id, own.eos_ids, own.vocab_size)


def test_q8_0_is_within_its_step_of_the_merged_weights(smol: BaseSpec, adapter: Any, tmp_path: Path) -> None:
    folder = adapter(smol)
    merged = load_file(merge(folder, smol, tmp_path / "m", dtype=torch.float32) / "model.safetensors")

    reader = gguf.GGUFReader(write_gguf_merged(folder, smol, tmp_path / "m.gguf", kind="q8_0"))

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors["blk.1.ffn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    wanted = merged["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.abs(values - wanted).max() <= np.abs(wanted).max() / 127


def test_sentencepieces_vocabulary_keeps_its_order_of_merging(base_home: Home, adapter: Any, tmp_path: Path) -> None:
    spec = resolve_base(base_home, NAME)

    reader = gguf.GGUFReader(write_gguf_merged(adapter(spec), spec, tmp_path / "m.gguf", onto="nf4"))

    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert len(tokens) == len(scores) == spec.vocab_size
    assert (kinds[1], kinds[2], kinds[tokens.index("<0x41>")]) == (3, 3, 6)
    by_score = sorted((t for t in tokens[300:] if len(t) > 1), key=lambda t: -scores[tokens.index(t)])
    assert by_score == [t for t in tokens[300:] if len(t) > 1], "SentencePiece gives ids in the order of merging"


def test_what_llama_cpp_would_read_otherwise_is_refused(smol: BaseSpec, adapter: Any, tmp_path: Path) -> None:
    turned = BaseSpec(
        smol.id,
        smol.path,
        smol.identity,
        {**smol.config, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
    )
    folder = adapter(smol)
    with pytest.raises(BaseModelError, match="llama3"):
        write_gguf_merged(folder, turned, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))
    (tmp_path / "there.gguf").touch()
    with pytest.raises(Conflict):
        write_gguf_merged(folder, smol, tmp_path / "there.gguf")
