"""The two arms of bench/gpu_training.py and tests/gpu: a random Llama in NF4 with a LoRA, plain PEFT's or ours."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from onebase.adapter import BaseIdentity
from onebase.base_model import LoadedBase
from onebase.bases import BaseSpec
from onebase_training.assemble import prepare
from onebase_training.config import Recipe, make_recipe
from onebase_training.objective import Objective


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int = 4096
    inner: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000
    context: int = 2048

    def config(self) -> Any:
        return transformers.LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )


FULL = Shape()
TINY = Shape(hidden=128, inner=256, layers=2, heads=4, kv_heads=4, vocab=512, context=128)


@dataclass(slots=True)
class Arm:
    """`objective` is ours alone."""

    name: str
    model: Any
    recipe: Recipe
    device: torch.device
    objective: Objective | None = None

    @property
    def named(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named]


def plain(shape: Shape, device: torch.device, lora: dict[str, Any], **settings: Any) -> Arm:
    """PEFT and bitsandbytes as their guides show: kbit preparation, checkpointing, autocast around fp32 adapters."""
    import peft

    dtype = settings.get("dtype", torch.bfloat16)
    model = random_base(shape, device, dtype)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    targets = lora["target_modules"]
    config = peft.LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora.get("dropout", 0.0),
        target_modules=targets if targets != "all-linear" else _LINEARS,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config).train()
    arm = Arm("plain", model, _recipe(lora, None), device)
    _start(arm, settings.get("b_std", 0.0))
    return arm


def ours(shape: Shape, device: torch.device, lora: dict[str, Any], **settings: Any) -> Arm:
    dtype = settings.get("dtype", torch.bfloat16)
    model = random_base(shape, device, dtype)
    model.name_or_path = model.config._name_or_path = "random"
    identity = BaseIdentity(id="random")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    # No tokenizer: the rows are made of ids.
    base = LoadedBase(model, None, BaseSpec("random", Path("random"), identity, config), dtype)  # type: ignore[arg-type]
    recipe = _recipe(lora, settings.get("memory_gb"))
    torch.manual_seed(1)
    objective = prepare(base, recipe)
    arm = Arm("ours", objective.model, recipe, device, objective)
    objective.train()
    _start(arm, settings.get("b_std", 0.0))
    return arm


_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _recipe(lora: dict[str, Any], memory_gb: float | None) -> Recipe:
    return make_recipe(
        {
            "name": "bench",
            "data": {"train": "none"},
            "lora": lora,
            "train": {"learning_rate": 2e-4, "schedule": "constant", "warmup": 0, "loss": "all"},
            "compute": {"memory_gb": memory_gb, "keep_dequantized": False},
        }
    )


def _start(arm: Arm, b_std: float) -> None:
    """The same first adapter in both arms, by name; B of zero is PEFT's own start."""
    for name, parameter in sorted(arm.named):
        generator = torch.Generator().manual_seed(sum(name[name.index("layers.") :].encode()))
        std = b_std if "lora_B" in name else parameter.shape[1] ** -0.5
        values: Tensor = torch.randn(parameter.shape, generator=generator) * std
        parameter.data.copy_(values)


def random_base(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The same weights at every call. Each linear of the layers is quantised where it lies."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = transformers.LlamaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _nf4(child, device, dtype))
    # transformers and PEFT ask a model whether it is quantised, not its modules.
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    return model


def _nf4(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> Linear4bit:
    made = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = Params4bit(
        linear.weight.data.contiguous(),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    )
    made.weight = weight.to(device)
    if hasattr(made, "support_avx512bf16_for_cpu"):
        made.support_avx512bf16_for_cpu = False  # see base_model.py
    return made
