"""Small PEFT LoRA folders for tests, written with numpy: a sound one, and any way of breaking it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from onebase.adapter import BaseIdentity

SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "mlp.down_proj": (8, 16),
    }.items()
}
BASE = BaseIdentity(id="someone/tiny", revision="r1", config_hash="aa" * 32, quantization="nf4")
Tensors = dict[str, NDArray[Any]]


def config(**changes: Any) -> dict[str, Any]:
    """What PEFT writes for a plain LoRA of q and v with r=4."""
    plain = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "base_model_name_or_path": "someone/tiny",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return plain | changes


def key(module: str, side: str) -> str:
    """PEFT's name of a tensor."""
    return f"base_model.model.{module}.lora_{side}.weight"


def tensors(rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj"), seed: int = 0) -> Tensors:
    """lora_A [r, in] and lora_B [out, r] of every targeted layer, fp32."""
    rng = np.random.default_rng(seed)
    found: Tensors = {}
    for module, (out, into) in SHAPES.items():
        if module.endswith(targets):
            found[key(module, "A")] = rng.standard_normal((rank, into), dtype=np.float32)
            found[key(module, "B")] = rng.standard_normal((out, rank), dtype=np.float32)
    return found


def write_adapter(
    folder: Path, weights: Mapping[str, NDArray[Any]] | None = None, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the folder; what is not given is sound."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors() if weights is None else weights), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config() if settings is None else settings))
    return folder
