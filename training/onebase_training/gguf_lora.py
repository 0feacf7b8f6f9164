"""An adapter as a GGUF LoRA file, for llama.cpp and what stands on it. Reads PEFT's two files, writes one.

llama.cpp keeps q and k of Llama in another row order (pairs of RoPE next to each other), so their B matrices are
permuted as its own converter permutes the weights (llama.cpp, conversion of LlamaModel, `permute`).
"""

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from onebase.adapter import WEIGHTS, AdapterFiles
from onebase.bases import BaseSpec
from onebase.errors import AdapterInvalid

NAMES: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf_lora(adapter: Path, base: BaseSpec, dest: Path) -> Path:
    """Write the PEFT folder `adapter` of `base` as `dest`; scaling (alpha / r, rsLoRA) is folded into each B.

    Raises AdapterInvalid for DoRA, which GGUF's LoRA can't say.
    """
    files = AdapterFiles.read(adapter)
    if files.config.use_dora:
        raise AdapterInvalid(str(adapter), ["DoRA can't be written as a GGUF LoRA; --form gguf-merged can"])
    partial = dest.with_name(f".{dest.name}.partial")
    try:
        with closing(gguf.GGUFWriter(partial, "llama")) as writer:
            _write(writer, files, load_file(adapter / WEIGHTS), base)
        os.replace(partial, dest)
    finally:
        partial.unlink(missing_ok=True)  # of what failed or was interrupted
    return dest


def _write(writer: Any, files: AdapterFiles, weights: Mapping[str, Tensor], base: BaseSpec) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # 0: no further scaling
    for module in sorted(files.modules()):
        prefix = f"base_model.model.{module}"
        a = weights[f"{prefix}.lora_A.weight"].float().numpy()
        b = weights[f"{prefix}.lora_B.weight"].float().mul(files.config.scaling(module)).numpy()
        layer, name = module.removeprefix("model.layers.").split(".", 1)
        target = f"blk.{layer}.{NAMES[name]}.weight"
        writer.add_tensor(f"{target}.lora_a", a)
        writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(in_llama_cpp_order(b, name, base)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def in_llama_cpp_order(b: NDArray[np.float32], name: str, base: BaseSpec) -> NDArray[np.float32]:
    """Rows of q's and k's B [out, r], weight or bias: from halves (x, y) of each head to pairs; others unchanged."""
    kv_heads = base.config.get("num_key_value_heads") or base.config["num_attention_heads"]
    heads = {"self_attn.q_proj": int(base.config["num_attention_heads"]), "self_attn.k_proj": int(kv_heads)}.get(name)
    if heads is None or base.config["model_type"] not in ("llama", "mistral"):
        return b
    return b.reshape(heads, 2, b.shape[0] // heads // 2, *b.shape[1:]).swapaxes(1, 2).reshape(b.shape)
