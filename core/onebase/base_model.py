"""The only code that builds the 4-bit base: NF4, double quantisation, bitsandbytes' Linear4bit. Torch lives here.

The trainer and the serving runner load the same files through `load_base`, so an adapter meets the very values in
serving that it met in training. The module tree is transformers' own. No network, and nothing about adapters.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from onebase.base_cache import quantized_copy, write_quantized_copy
from onebase.base_convert import quiet
from onebase.bases import BaseSpec, verify_base
from onebase.errors import BaseModelError
from onebase.tokenizer import TextTokenizer

ComputeDtype = Literal["bfloat16", "float32"]

logger = logging.getLogger(__name__)

_VERIFY_BELOW: Final = 2 << 30
"""Bytes: smaller bases have every checksum read at each load (under a second a GB); larger ones when fetched."""


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """`model` is a frozen transformers causal LM in eval mode whose linears (all but lm_head) are Linear4bit."""

    model: Any
    tokenizer: TextTokenizer
    spec: BaseSpec
    compute_dtype: torch.dtype
    is_shared: bool = False
    """Its weights are a server's (onebase_training/shared_base.py): nothing may be held besides."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


def load_base(
    spec: BaseSpec,
    device: str | torch.device = "cpu",
    *,
    compute_dtype: ComputeDtype = "bfloat16",
    quantize: bool = True,
    attn_implementation: str = "sdpa",
    tokenizer: TextTokenizer | None = None,
) -> LoadedBase:
    """Load a base whole on one device. `quantize=False` gives the unquantised weights, for merging adapters.

    Linear layers hold NF4 and compute in `compute_dtype`; embeddings, norms and lm_head are kept in it.
    Raises BaseModelError when the files are damaged, don't fit the config, or the device lacks memory.
    """
    if sum(file.stat().st_size for file in spec.path.glob("*.safetensors")) < _VERIFY_BELOW:
        verify_base(spec)
    tokenizer = tokenizer or TextTokenizer.load(spec.path)
    check_tokenizer(spec, tokenizer)
    dtype = torch.bfloat16 if compute_dtype == "bfloat16" else torch.float32
    copy = quantized_copy(spec) if quantize else None
    with offline(), quiet():
        model = _build(spec, copy, torch.device(device), dtype, quantize, attn_implementation)
        if quantize and copy is None:
            write_quantized_copy(spec, model)
    # Adapters and messages must name the base, not a place on this disk.
    model.name_or_path = model.config._name_or_path = spec.id
    model.requires_grad_(False)
    model.eval()
    _keep_weights_as_stored(model)
    _compute_in(model, dtype)
    logger.info("base %s on %s: %.0f MB", spec.id, device, memory_bytes(model) / 1e6)
    return LoadedBase(model=model, tokenizer=tokenizer, spec=spec, compute_dtype=dtype)


def check_tokenizer(spec: BaseSpec, tokenizer: TextTokenizer) -> None:
    """Every id that the tokenizer can write has an embedding row, and there is an eos to stop at."""
    problems = []
    special = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
    problems += [
        f"{name} id {token} has no embedding row"
        for name, token in special.items()
        if token is not None and not 0 <= token < spec.vocab_size
    ]
    if tokenizer.pad_id in tokenizer.eos_ids:
        problems.append("the pad id is an eos id, so padding could not be told from the end of an answer")
    if problems:
        raise BaseModelError(
            f"base {spec.id}: tokenizer and model don't fit: {'; '.join(problems)} "
            f"(the embedding has {spec.vocab_size} rows)",
            param="base",
        )


def linear4bit_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> Linear4bit, as in the base (no PEFT prefixes)."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def dequantized(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """A Linear4bit's weight [out, in] as plain values: exactly those that its forward pass multiplies by."""
    from bitsandbytes.functional import dequantize_4bit

    unpack: Any = getattr(module, "unpack", None)
    if unpack is not None:  # in another layout than bitsandbytes': its owner knows how
        shared: torch.Tensor = unpack(dtype)
        return shared
    weight: Any = module.weight
    values: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return values.to(dtype)


def _keep_weights_as_stored(model: nn.Module) -> None:
    """Forbid bitsandbytes' CPU repacking (AVX512-BF16), which a forward pass without gradients sets off.

    bitsandbytes 0.50.2 repacks a Linear4bit in place and never undoes it: a later backward pass through it gives
    gradients that are zero or wrong, without a word, and `dequantized` would read scrambled values. Without the
    `kernels` package it is also slower (measured on SmolLM2-135M: 43 s against 1.4 s for the same evaluation).
    """
    for module in linear4bit_modules(model).values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """The quantised copy was written in bf16, and transformers keeps what it finds in such a file."""
    for module in linear4bit_modules(model).values():
        weight: Any = module.weight
        module.compute_dtype = weight.quant_state.dtype = dtype  # type: ignore[assignment]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def memory_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared storage counted once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@contextmanager
def offline() -> Iterator[None]:
    """Inside, transformers and the hub client may not reach the network, whatever the environment says."""
    import huggingface_hub.constants as constants

    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous


def _build(
    spec: BaseSpec,
    copy: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    quantize: bool,
    attn_implementation: str,
) -> Any:
    import transformers

    settings: dict[str, Any] = {}
    if quantize and copy is None:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            copy or spec.path,
            dtype=dtype,
            device_map={"": str(device)},
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **settings,
        )
    except torch.OutOfMemoryError as error:
        raise BaseModelError(f"base {spec.id} does not fit in the memory of {device}: {error}") from error
    missing, wrong = sorted(info["missing_keys"])[:5], sorted(info["mismatched_keys"])[:5]
    if missing or wrong:
        raise BaseModelError(f"base {spec.id}: weights don't fit config.json: missing {missing}, wrong shape {wrong}")
    gc.collect()
    return model
