"""Puts the layer that is written out whole (decoder_layer.py) in place of every decoder layer that it can stand for.

A layer of another form (DoRA, norms of q and k, values held unpacked, a rank too large) keeps fuse.py's way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from onebase_training.decoder_layer import Angles, DecoderLayerForward, LayerMath, Norm
from onebase_training.fuse import UnpackedWeight, is_attention, is_plain_lora, is_silu
from onebase_training.linear_group import MAX_RANK, Linear, LinearGroup


def fuse_layers(model: Any, dtype: torch.dtype) -> int:
    """How many were replaced. `model`: a PeftModel on a Llama-family base, after `fuse`."""
    angles, count = Angles(), 0
    for layer in model.get_base_model().model.layers:
        math = _layer_math(layer, dtype)
        if math is None:
            continue
        forward = DecoderLayerForward(layer, math, angles, dtype)
        # It computes again by itself: transformers must not wrap it in a checkpoint.
        forward.recompute, layer.gradient_checkpointing = bool(getattr(layer, "gradient_checkpointing", False)), False
        layer.forward = forward
        count += 1
    return count


def _layer_math(layer: Any, dtype: torch.dtype) -> LayerMath | None:
    attn: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    norms = [_norm(getattr(layer, name, None)) for name in ("input_layernorm", "post_attention_layernorm")]
    known = attn is not None and is_attention(attn) and not hasattr(attn, "q_norm")
    if not known or mlp is None or not is_silu(getattr(mlp, "act_fn", None)) or norms[0] is None or norms[1] is None:
        return None
    groups = [
        _group(modules, dtype)
        for modules in (
            (attn.q_proj, attn.k_proj, attn.v_proj),
            (attn.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
    ]
    qkv, o, gate_up, down = groups
    if qkv is None or o is None or gate_up is None or down is None:
        return None
    size = int(attn.head_dim)
    queries, keys = (int(_base(proj).out_features) // size for proj in (attn.q_proj, attn.k_proj))
    return LayerMath((norms[0], norms[1]), (qkv, o, gate_up, down), (queries, keys, size), float(attn.scaling), dtype)


def _norm(module: Any) -> Norm | None:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    return Norm(module.weight, float(module.variance_epsilon))


def _group(modules: Sequence[Any], dtype: torch.dtype) -> LinearGroup | None:
    linears = [_linear(module, dtype) for module in modules]
    dropouts = {_dropout(module) for module in modules if hasattr(module, "base_layer")}
    if len(dropouts) > 1:
        return None
    known = [linear for linear in linears if linear is not None]
    return LinearGroup(known, max(dropouts, default=0.0), dtype) if len(known) == len(linears) else None


def _linear(module: Any, dtype: torch.dtype) -> Linear | None:
    from bitsandbytes.nn import Linear4bit

    base = _base(module)
    if not isinstance(base, Linear4bit) or getattr(base, "held_weight", None) is not None:
        return None
    weight, shape = UnpackedWeight(base, dtype), (base.out_features, base.in_features)
    if base is module:
        return Linear(weight, shape, base.bias)
    if not is_plain_lora(module) or module.lora_A["default"].weight.shape[0] > MAX_RANK:
        return None
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return Linear(weight, shape, base.bias, a, b, float(module.scaling["default"]))


def _dropout(module: Any) -> float:
    return float(getattr(module.lora_dropout["default"], "p", 0.0))


def _base(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module)
