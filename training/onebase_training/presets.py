"""The named sets of training defaults, as plain values. The `default` preset is `Recipe`'s own field defaults."""

from collections.abc import Mapping
from typing import Any, Final

SEED: Final[Mapping[str, Any]] = {
    "data": {"too_long": "cut", "eval_fraction": 0.0, "deduplicate": False, "unknown_role": "keep"},
    "lora": {"r": 8, "alpha": 32, "dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "train": {
        "epochs": 1,
        "batch_size": 4,  # 1 a device x 4 accumulated
        "learning_rate": 2e-4,
        "schedule": "linear",
        "warmup": 100,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optimizer": "adamw_torch",
        "loss": "all",
        "normalize": "rows",
        "packing": False,
        "seed": 42,
        "log_every": 20,
        "eval_every": "never",
        "save_every": 500,
        "tensorboard": True,
    },
}
"""georgesung/llm_qlora's QloraTrainer.py and configs, snapshot cc6683e. What differs from it, docs/training.md says."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {"default": {}, "seed": SEED}


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, section by section."""
    result = dict(defaults)
    for key, value in given.items():
        below = result.get(key)
        nested = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if nested and isinstance(below, Mapping) else value
    return result
