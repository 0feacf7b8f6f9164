"""Random LoRA adapters in PEFT's files, for benchmarks: speed does not depend on their values."""

import warnings
from pathlib import Path
from typing import Any

MODULES = {
    "qkv": ["q_proj", "k_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def write_adapters(model: Any, folder: Path, count: int, rank: int, modules: str) -> list[Path]:
    """`count` adapters of that rank, small enough to leave the base's text readable."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=MODULES[modules], task_type="CAUSAL_LM")
    paths = []
    for index in range(count):
        name = f"adapter-{index}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
            for parameter_name, parameter in wrapped.named_parameters():
                if f".{name}." in parameter_name:
                    parameter.data.normal_(0.0, 0.01)
            wrapped.save_pretrained(folder, selected_adapters=[name])
            wrapped.unload()
        paths.append(folder / name)
    return paths
