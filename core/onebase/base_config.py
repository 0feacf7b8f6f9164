"""What a base's config.json says: whether we can load it, its linear layers, and what adapters depend on. No torch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from onebase.errors import BaseModelError

ARCHITECTURES: Final[Mapping[str, str]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The Llama family, by `architectures[0]`; OpenLLaMA, Vicuna, TinyLlama and SmolLM2 say LlamaForCausalLM."""

_IDENTITY_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
)


def check_architecture(config: Mapping[str, Any], path: Path) -> None:
    """Raises BaseModelError, with the list of those that work, for anything outside the Llama family."""
    found = (config.get("architectures") or [f"model_type {config.get('model_type')!r}"])[0]
    if found not in ARCHITECTURES:
        raise BaseModelError(
            f"base at {path} has architecture {found}, which onebase can't load. It loads: {', '.join(ARCHITECTURES)}",
            param="base",
            code="unsupported_architecture",
        )
    if config.get("quantization_config"):
        raise BaseModelError(
            f"base at {path} is already quantised. Give the original 16-bit weights: onebase quantises them to NF4 "
            "itself, so that every adapter is trained and served on the same values",
            param="base",
            code="base_quantised",
        )


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Each linear layer that a LoRA may target: module path -> (out features, in features), lm_head left out."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    layer = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(int(config["num_hidden_layers"]))
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}


def config_hash(config: Mapping[str, Any], tokenizer_json: Path) -> str:
    """What an adapter depends on: shapes, rotary settings and the vocabulary; not the library's version."""
    heads = int(config["num_attention_heads"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    essence = {key: config.get(key) for key in _IDENTITY_KEYS} | {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or int(config["hidden_size"]) // heads,
        "rms_norm_eps": f"{float(config['rms_norm_eps']):.4g}",
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        "rope_type": rope.get("rope_type") or rope.get("type") or "default",
        "vocabulary": _vocabulary_hash(tokenizer_json),
    }
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()[:32]


def _vocabulary_hash(tokenizer_json: Path) -> str:
    content = json.loads(tokenizer_json.read_text("utf-8"))
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram: [[token, score], ...]
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    ids = json.dumps({**vocabulary, **added}, sort_keys=True).encode()
    return hashlib.sha256(ids).hexdigest()
