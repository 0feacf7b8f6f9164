"""PEFT adapters on the 4-bit base, ready to train: fp32 LoRA, frozen base, no pickles, no embedding in the adapter."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from onebase.base_model import ComputeDtype, LoadedBase, dequantized, linear4bit_modules
from onebase.errors import RecipeError
from onebase_training.config import ComputeConfig, LoraConfig

logger = logging.getLogger(__name__)

ALL_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


MERGE_IT: Final = (
    "A DoRA rescales the base's own outputs, so it can't be served beside others and is not published; merge it into a "
    "model of its own: onebase export RUN/adapter DEST --form merged --onto nf4"
)


def attach_adapter(base: LoadedBase, lora: LoraConfig) -> Any:
    """A fresh PEFT adapter on the base's model; the PeftModel. Raises RecipeError for targets that don't exist."""
    import peft

    known = set(base.spec.linear_shapes)
    targets = list(ALL_LINEAR if lora.target_modules == "all-linear" else lora.target_modules)
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in known)]
    if unknown:
        raise RecipeError(
            f"lora.target_modules: {', '.join(unknown)} not in {base.spec.id}; it has {', '.join(ALL_LINEAR)}. "
            "lm_head and embeddings can't be adapted: adapters share one frozen base",
            param="lora.target_modules",
        )
    _check_layers(lora, int(base.spec.config["num_hidden_layers"]))
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=_plain_number(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=list(lora.layers) if lora.layers is not None else None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={key: _plain_number(value) for key, value in lora.alpha_pattern.items()},
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init if lora.init in ("gaussian", "orthogonal") else True,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.spec.id,
    )
    with _without_peft_hints():
        model = peft.get_peft_model(base.model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    assert all(p.dtype == torch.float32 for p in trainable), "LoRA weights are kept in fp32"
    return model


@contextmanager
def published_adapter(base: LoadedBase, folder: Path | None) -> Iterator[Any]:
    """The base with a published version's adapter, for as long as the block lasts; None: the base itself."""
    if folder is None:
        yield base.model
        return
    import peft

    with _without_peft_hints():
        model = peft.PeftModel.from_pretrained(base.model, str(folder), local_files_only=True)
    try:
        yield model
    finally:
        model.unload()


@contextmanager
def _without_peft_hints() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 a question under its old name, which would warn every user of every run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def keep_dequantized(base: LoadedBase, setting: bool | str) -> bool:
    """Hold every NF4 weight's values in the compute dtype, so that no use unpacks them again. True if it was done.

    The values are those that bitsandbytes' own forward multiplies by; only the time to unpack is saved.
    """
    if setting == "auto":
        roomy = base.device.type == "cpu" and _dense_bytes(base) < _free_memory() / 3
        setting = roomy and not base.is_shared
    if not setting:
        return False
    for module in linear4bit_modules(base.model).values():
        dense = dequantized(module, base.compute_dtype)
        module.held_weight = dense
        bias: Any = module.bias
        module.forward = _DenseForward(dense, bias)
    return True


class _DenseForward:
    """Stands in for Linear4bit.forward."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def checkpoint_activations(base: LoadedBase, setting: bool | str) -> bool:
    """Gradient checkpointing, non-reentrant: gradients flow though the base's inputs are frozen (pitfall 13).

    `auto`: on CUDA, where preflight then lets as many layers keep their activations as memory allows.
    """
    if setting == "auto":
        setting = base.device.type == "cuda"
    if not setting:
        return False
    if hasattr(base.model, "activation_checkpointing_enable"):
        base.model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    return True


def compute_settings(compute: ComputeConfig, local_rank: int | None = None) -> torch.device:
    """The device to train on. Sets the number of CPU threads when the recipe names one.

    `local_rank`: this process's number on its machine, of several that train together: each has the GPU of its number.
    Raises RecipeError for a device that is not there.
    """
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if compute.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = _named_device(compute.device)
    if device.type != "cuda":
        return device
    if local_rank is not None:
        if device.index is not None:
            raise RecipeError(
                f"compute.device: {compute.device} is one GPU, but several processes train: say cuda, and each takes "
                "its own",
                param="compute.device",
            )
        device = torch.device("cuda", local_rank)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= seen:
        raise RecipeError(
            f"compute.device: {device} asked for, but torch sees {seen} CUDA GPUs", param="compute.device"
        )
    torch.cuda.set_device(device.index or 0)
    return device


def _named_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"compute.device: {name!r} is none; use auto, cpu, cuda or cuda:N", param="compute.device")
    return device


def compute_dtype(setting: Literal["auto", "bfloat16", "float32"], device: torch.device) -> ComputeDtype:
    """`auto` decided for this machine."""
    if setting != "auto":
        return setting
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    has_bf16 = device.type == "cuda" or (asked is not None and bool(asked()))
    return "bfloat16" if has_bf16 else "float32"


def _check_layers(lora: LoraConfig, layers: int) -> None:
    wrong = [layer for layer in lora.layers or () if not 0 <= layer < layers]
    if wrong:
        raise RecipeError(
            f"lora.layers: {wrong} out of range; the base has layers 0 to {layers - 1}", param="lora.layers"
        )


def _dense_bytes(base: LoadedBase) -> int:
    values = sum(out * into for out, into in base.spec.linear_shapes.values())
    return values * torch.finfo(base.compute_dtype).bits // 8


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _plain_number(value: float) -> float | int:
    """32.0 -> 32, as PEFT writes it."""
    return int(value) if value == int(value) else value
