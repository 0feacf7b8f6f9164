"""A Llama GGUF file -> safetensors, config.json, tokenizer.json, straight from the file. No torch, no transformers.

transformers can read GGUF too; it takes 20 CPU seconds for the embedded base where this takes 4, on a user's very
first command, and it forgets that SmolLM2 splits numbers into digits. Tensors and all other tokens are the same.
"""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onebase.errors import BaseModelError

_TENSORS: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN: Final = 3
_DIGITS_APART: Final = ("smollm",)
"""`tokenizer.ggml.pre` of those that split numbers into digits before merging."""


def convert_gguf(file: Path, into: Path) -> None:
    """Dequantise a GGUF file into the folder `into`. Raises BaseModelError for what is not a Llama with a BPE.

    Saved in bf16: the published weights are bf16, compute is bf16, and rounding Q4_1's values to it (2^-9 relative)
    is small beside Q4_1's own step (1/15 of a block's range); it halves the file that fp32 would make.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.model") != "gpt2":
        raise BaseModelError(f"{file} is not a Llama with a byte-level BPE tokenizer", param="base")
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    config = _config(fields, tied)
    _write_json(into / "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(into / "generation_config.json", generation)
    _write_tokenizer(fields, config, into)
    _write_weights(reader.tensors, config, into / "model.safetensors")


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "dtype": "bfloat16",
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "num_attention_heads": heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        # GGUF keeps it in fp32: 9.99999974e-06 is the authors' 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _write_tokenizer(fields: dict[str, Any], config: dict[str, Any], into: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, byte_level] if fields.get("tokenizer.ggml.pre") in _DIGITS_APART else [byte_level]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True, **flags}
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    _write_json(into / "tokenizer.json", spec)
    unknown = int(fields.get("tokenizer.ggml.unknown_token_id", 0))
    eos, pad = config["eos_token_id"], config["pad_token_id"]
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[eos],
        "unk_token": tokens[unknown],
        # A pad that is eos would hide eos from trainers that mask by id; onebase itself masks by position.
        "pad_token": tokens[unknown if pad == eos else pad],
    }
    _write_json(into / "tokenizer_config.json", names)
    template = fields.get("tokenizer.chat_template")
    if template:
        (into / "chat_template.jinja").write_text(template, "utf-8")


def _write_weights(tensors: Any, config: dict[str, Any], file: Path) -> None:
    import gguf

    values: dict[str, NDArray[np.uint16]] = {}
    for tensor in tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if not np.isfinite(weight).all():
            raise BaseModelError(f"tensor {tensor.name} dequantises to values that are not finite", param="base")
        name = _name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = _halves_together(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = _halves_together(weight, config["num_key_value_heads"])
        values[name] = to_bf16(weight)
    _write_safetensors(values, file)


def _write_safetensors(tensors: dict[str, NDArray[np.uint16]], file: Path) -> None:
    """The format itself (length, JSON header, data): numpy has no bf16 that the library would take."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(tensor.astype("<u2", copy=False).tobytes())


def _name(gguf_name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm", "output.weight": "lm_head"}
    if gguf_name in whole:
        return f"{whole[gguf_name]}.weight"
    parts = gguf_name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _TENSORS or parts[3] != "weight":
        raise BaseModelError(f"tensor {gguf_name} is none of a Llama's", param="base")
    return f"model.layers.{parts[1]}.{_TENSORS[parts[2]]}.weight"


def _halves_together(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp keeps the two halves of each head interleaved for its rotary form; take that back."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; the bits. Finite values only."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1, sort_keys=file.name != "tokenizer.json"), "utf-8")
