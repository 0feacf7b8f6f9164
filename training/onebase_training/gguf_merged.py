"""A base with an adapter added in as one GGUF file, for llama.cpp. One tensor in memory at a time.

The gguf package knows the names and the forms; the vocabulary is gguf_vocabulary.py's. It must not know the store.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from onebase.bases import BaseSpec, weight_files
from onebase.errors import BaseModelError, Conflict
from onebase_training.gguf_lora import in_llama_cpp_order
from onebase_training.gguf_vocabulary import add_vocabulary
from onebase_training.merge import Merging, Onto

GgufType = Literal["f16", "bf16", "q8_0"]

_ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` -> llama.cpp's own word."""
_TYPES: Final = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def write_gguf_merged(
    adapter: Path, spec: BaseSpec, dest: Path, *, onto: Onto = "base", kind: GgufType = "f16", name: str = ""
) -> Path:
    """Write the file `dest`. Raises AdapterInvalid for what can't be merged, BaseModelError for a base that llama.cpp
    would read otherwise than it is meant, Conflict when `dest` exists."""
    if dest.exists():
        raise Conflict(f"{dest} already exists", param="dest")
    merging = Merging(adapter, spec, onto)
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = dest.with_name(f".{dest.name}.partial")
    try:
        with closing(gguf.GGUFWriter(partial, _ARCHITECTURES[spec.config["model_type"]])) as writer:
            _write(writer, merging, spec, kind, name)
        os.replace(partial, dest)
    finally:
        partial.unlink(missing_ok=True)  # of what failed or was interrupted
    return dest


def _write(writer: Any, merging: Merging, spec: BaseSpec, kind: GgufType, name: str) -> None:
    _describe(writer, spec, kind, name)
    add_vocabulary(writer, spec)
    names = _names(spec)
    for tensor, shape in _shapes(spec):
        form = _form(shape, kind)
        block, size = gguf.GGML_QUANT_SIZES[form]
        count = int(np.prod(shape)) // block * size
        writer.add_tensor_info(names(tensor), shape, np.dtype(np.float32), count, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shard in weight_files(spec.path):
        for tensor, weight in merging.tensors(shard):
            if not _is_left_out(tensor, spec):
                values = in_llama_cpp_order(weight.float().numpy(), _module(tensor), spec)
                writer.write_tensor_data(_encoded(values, _form(values.shape, kind)))


def _describe(writer: Any, spec: BaseSpec, kind: GgufType, name: str) -> None:
    config = spec.config
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head = int(config.get("head_dim") or hidden // heads)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turning = rope.get("rope_type", rope.get("type", "default"))
    if turning != "default":
        raise BaseModelError(
            f"base {spec.id}: {turning!r} rotary positions can't be written as GGUF; use --form merged"
        )
    if config.get("sliding_window") and config.get("use_sliding_window", config["model_type"] == "mistral"):
        raise BaseModelError(f"base {spec.id}: its sliding window can't be said in GGUF's llama architecture")
    writer.add_name(name or spec.id)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(spec.vocab_size)


def _names(spec: BaseSpec) -> Callable[[str], str]:
    kinds = {word: arch for arch, word in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(
        kinds[_ARCHITECTURES[spec.config["model_type"]]], int(spec.config["num_hidden_layers"])
    )

    def named(tensor: str) -> str:
        known: str | None = table.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise BaseModelError(f"base {spec.id}: llama.cpp has no name for its tensor {tensor}")
        return known

    return named


def _shapes(spec: BaseSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    for shard in weight_files(spec.path):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if not _is_left_out(name, spec):
                    yield name, tuple(file.get_slice(name).get_shape())


def _is_left_out(tensor: str, spec: BaseSpec) -> bool:
    """A head that is the embedding, and rotary tables of old checkpoints."""
    tied = bool(spec.config.get("tie_word_embeddings")) and tensor == "lm_head.weight"
    return tied or tensor.endswith("rotary_emb.inv_freq")


def _module(tensor: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `self_attn.q_proj`; else as it is."""
    return tensor.split(".", 3)[3].rpartition(".")[0] if tensor.startswith("model.layers.") else tensor


def _form(shape: tuple[int, ...], kind: GgufType) -> Any:
    """Vectors stay fp32; rows that are no whole number of blocks become F16."""
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return _TYPES[kind][0]


def _encoded(values: NDArray[np.float32], form: Any) -> NDArray[Any]:
    values = np.ascontiguousarray(values, dtype=np.float32)
    encoded: NDArray[Any] = gguf.quants.quantize(values, form)
    return encoded
