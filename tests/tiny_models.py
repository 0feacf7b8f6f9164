"""Tiny random models of each architecture in NF4 and PEFT adapters for them: real libraries, milliseconds a forward."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
    "llama3_rope": lambda: transformers.LlamaConfig(
        **SIZES,
        head_dim=32,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),
}


def tiny_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model of that kind, saved, then loaded back in NF4 with double quantisation as `load_base` does."""
    where = folder / f"{name}-{seed}"
    if not where.exists():
        transformers.set_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
        for parameter in model.parameters():
            # Larger than the default initialisation, so that greedy tokens differ and near ties are rare.
            parameter.data.normal_(0.0, 0.08) if parameter.ndim > 1 else parameter.data.normal_(1.0, 0.2)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.data.normal_(0.0, 0.3)
        model.save_pretrained(where)
    return load_nf4(where, dtype)


def load_nf4(where: Path, dtype: torch.dtype) -> Any:
    """A saved model in NF4, frozen, on the CPU."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
    )
    model.requires_grad_(False)
    for module in model.modules():
        # In eval mode on a CPU with AVX512-BF16 bitsandbytes would repack the weights with absmax rounded to bf16 and
        # compute in bf16 whatever was asked: no reference for exact tokens.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def peft_adapter(model: Any, folder: Path, name: str, *, seed: int, **config: Any) -> Path:
    """Random LoRA weights (B too, so that it changes the answers) in PEFT's own two files."""
    import peft

    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of transformers
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings), adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in wrapped.named_parameters():
            if f"lora_B.{name}" in parameter_name:
                parameter.data.normal_(0.0, 0.05, generator=generator)
            elif f"lora_A.{name}" in parameter_name:
                parameter.data.normal_(0.0, 0.1, generator=generator)
        wrapped.save_pretrained(folder, selected_adapters=[name])
        wrapped.unload()
    return folder / name
