"""Puts the fused operations into a PEFT model, module by module. transformers' module tree and PEFT's parameters stay.

A module whose form is not known keeps its own forward (DoRA, another activation), so this can only make
things faster. Generation with a cache goes the original way.
"""

from typing import Any

import torch
from torch import Tensor, nn

from onebase.base_model import dequantized, linear4bit_modules
from onebase_training import attention
from onebase_training.cuda_choice import triton_unpack_for
from onebase_training.fused_ops import FrozenLinear, LoraLinear, RmsNorm, Rotary, SwiGlu


def fuse(model: Any, compute_dtype: torch.dtype) -> int:
    """Replace the forward of every module that is known; how many. `model` is a PeftModel on a Llama-family base."""
    from peft.tuners.lora import LoraLayer

    count = _fuse_frozen(model, compute_dtype)
    for module in model.modules():
        forward: Any = None
        if isinstance(module, LoraLayer):
            forward = _lora_forward(module, compute_dtype)
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            forward = _NormForward(module, compute_dtype)
        elif type(module).__name__.endswith("MLP") and is_silu(getattr(module, "act_fn", None)):
            forward = _MlpForward(module)
        elif is_attention(module):
            forward = _AttentionForward(module)
        elif isinstance(module, nn.Embedding):
            forward = _WideEmbedding(module)
        if forward is not None:
            module.forward = forward
            count += 1
    return count


def _fuse_frozen(model: Any, dtype: torch.dtype) -> int:
    """4-bit linears without an adapter, unless their values are held (lora.keep_dequantized gave them a forward)."""
    count = 0
    for module in linear4bit_modules(model).values():
        if getattr(module, "held_weight", None) is None:
            module.forward = _FrozenForward(module, dtype)
            count += 1
    return count


class _FrozenForward:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._weight, self._bias, self._dtype = UnpackedWeight(module, dtype), module.bias, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return FrozenLinear.apply(x.to(self._dtype), self._weight, self._bias).to(x.dtype)  # type: ignore[no-untyped-call, no-any-return]


class HeldWeight:
    """A frozen weight kept in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self) -> Tensor:
        return self.weight


class UnpackedWeight:
    """A 4-bit weight, unpacked at each use: exactly what bitsandbytes' forward multiplies by."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __call__(self, out: Tensor | None = None) -> Tensor:
        """[out, in], in `out` where it is given."""
        weight: Any = self._module.weight
        state = getattr(weight, "quant_state", None)  # none in a server's layout
        if state is not None and state.blocksize == 64 and (triton := triton_unpack_for(state.code)) is not None:
            return triton.unpack(weight.data, state, self._dtype, out)  # type: ignore[no-any-return]
        unpack: Any = getattr(self._module, "unpack", None)
        if unpack is not None:
            return unpack(self._dtype, out)  # type: ignore[no-any-return]
        values = dequantized(self._module, self._dtype)
        return values if out is None else out.copy_(values)


def _lora_forward(module: Any, dtype: torch.dtype) -> Any:
    """None unless it is one plain LoRA on a Linear4bit."""
    return _LoraForward(module, dtype) if is_plain_lora(module) else None


def is_plain_lora(module: Any) -> bool:
    """One LoRA and no variant of it, on a 4-bit linear."""
    from bitsandbytes.nn import Linear4bit

    return (
        list(module.lora_A) == ["default"]
        and isinstance(module.lora_dropout["default"], nn.Identity | nn.Dropout)
        and not module.lora_variant
        and isinstance(module.base_layer, Linear4bit)
    )


class _LoraForward:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        held = getattr(module.base_layer, "held_weight", None)
        self._weight = HeldWeight(held) if held is not None else UnpackedWeight(module.base_layer, dtype)
        self._bias = module.base_layer.bias
        self._a, self._b = module.lora_A["default"].weight, module.lora_B["default"].weight
        self._scaling = float(module.scaling["default"])
        self._dropout = float(getattr(module.lora_dropout["default"], "p", 0.0))
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        if self._module.disable_adapters:
            return self._module.base_layer(x)  # type: ignore[no-any-return]
        dropout = self._dropout if self._module.training else 0.0
        return LoraLinear.apply(x, self._weight, self._bias, self._a, self._b, self._scaling, dropout)  # type: ignore[no-untyped-call, no-any-return]


class _NormForward:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._weight, self._eps, self._dtype = module.weight, module.variance_epsilon, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return RmsNorm.apply(x, self._weight, self._eps, self._dtype)  # type: ignore[no-untyped-call, no-any-return]


class _WideEmbedding:
    """Starts the residual stream in fp32: 2 x layers sums in bf16 would cost as much accuracy as all else together.

    Each norm narrows it for the matrix products (what prepare_model_for_kbit_training reaches with fp32 norms).
    """

    def __init__(self, module: nn.Embedding) -> None:
        self._module = module

    def __call__(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self._module.weight, self._module.padding_idx)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


class _MlpForward:
    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self._module
        return mlp.down_proj(SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-untyped-call, no-any-return]


def is_silu(function: Any) -> bool:
    """torch's SiLU, or the class that transformers 5.17 has of its own."""
    return isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"


def is_attention(module: nn.Module) -> bool:
    needed = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")
    return type(module).__name__ in (
        "LlamaAttention",
        "MistralAttention",
        "Qwen2Attention",
        "Qwen3Attention",
    ) and all(hasattr(module, name) for name in needed)


class _AttentionForward:
    """Training's pass: no cache. Anything else goes the module's own way."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._original = module.forward

    def __call__(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        attn = self._module
        if kwargs.get("past_key_values") is not None or attn.config._attn_implementation != attention.NAME:
            return self._original(hidden_states, position_embeddings=position_embeddings, **kwargs)
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, attn.head_dim)
        query, key = attn.q_proj(hidden_states).view(shape), attn.k_proj(hidden_states).view(shape)
        value = attn.v_proj(hidden_states).view(shape)
        if hasattr(attn, "q_norm"):
            query, key = attn.q_norm(query), attn.k_norm(key)
        cos, sin = (angles.to(query.dtype) for angles in position_embeddings)
        query, key = Rotary.apply(query, cos, sin), Rotary.apply(key, cos, sin)  # type: ignore[no-untyped-call]
        out = attention.attend(query, key, value, attn.scaling, kwargs.get("borders"))
        return attn.o_proj(out.reshape(batch, length, -1)), None
