"""A loaded transformers model -> the tensors of the lean forward: fused projections in NF4, norms, rotary tables.

Fusing q|k|v and gate|up along N is exact, since NF4 blocks run along K; the nested absmax is un-nested first, to the
very values that bitsandbytes computes. Nothing here knows about adapters' files or requests.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebase.errors import BaseModelError
from onebase_server.kernels.ops import BLOCK, Kernels, NF4Weight

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Fused projection -> the modules that it is made of, in order."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a Llama-family model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    vocab: int
    eps: float
    max_context: int

    @property
    def scale(self) -> float:
        return float(self.head**-0.5)


@dataclass(frozen=True, slots=True)
class Projection:
    weight: NF4Weight
    bias: Tensor | None  # [N]
    offsets: tuple[int, ...]  # column borders of the modules in `PROJECTIONS`


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None  # [head], Qwen3
    k_norm: Tensor | None
    projections: dict[str, Projection]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    geometry: Geometry
    embed: Tensor  # [V, hidden]
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor  # [V, hidden]; `embed` itself when tied
    cos: Tensor  # [max_context, head // 2] fp32
    sin: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device


def read_weights(
    model: Any, kernels: Kernels, max_context: int | None = None, *, release: bool = False
) -> ModelWeights:
    """Take a transformers Llama, Mistral, Qwen2 or Qwen3 whose linears are Linear4bit, and prepare it for `kernels`.

    `release`: its linears are emptied as they are read, so that memory never holds all of them twice.

    The model must not have run on a CPU before: bitsandbytes then repacks its weights with a rounded absmax.
    Raises BaseModelError for what the lean forward does not cover.
    """
    config = model.config
    _refuse_unknown(config)
    geometry = _geometry(model, max_context)
    layers = [_read_layer(layer, kernels, release=release) for layer in model.model.layers]
    cos, sin = _rotary_tables(model, geometry)
    return ModelWeights(
        geometry=geometry,
        embed=model.model.embed_tokens.weight.detach(),
        layers=layers,
        norm=model.model.norm.weight.detach(),
        lm_head=model.lm_head.weight.detach(),
        cos=cos,
        sin=sin,
    )


def read_nf4(module: Any, name: str) -> NF4Weight:
    """One Linear4bit with its absmax un-nested: fp32 of dequantised uint8 + offset, as its own forward computes."""
    from bitsandbytes.functional import dequantize_blockwise

    state = getattr(module.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4":
        raise BaseModelError(f"{name} is not in NF4; load the base with onebase.base_model.load_base")
    if getattr(state, "packing_format_for_cpu", False):
        raise BaseModelError(f"{name} was repacked by a forward pass; load the base afresh for serving")
    n, k = state.shape
    if state.blocksize != BLOCK or k % BLOCK:
        raise BaseModelError(f"{name} [{n}, {k}] has blocks of {state.blocksize}; needed: {BLOCK} along each row")
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = module.weight.data.view(torch.uint8).reshape(n, k // 2)
    return NF4Weight(packed, absmax.float().reshape(n, k // BLOCK), (n, k), state.code.float())


def fuse(parts: list[NF4Weight]) -> NF4Weight:
    """Stack weights along N. Exact."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    return NF4Weight(
        packed=torch.cat([part.packed for part in parts]),
        absmax=torch.cat([part.absmax for part in parts]),
        shape=(rows, parts[0].shape[1]),
        code=parts[0].code,
    )


def _refuse_unknown(config: Any) -> None:
    known = ("llama", "mistral", "qwen2", "qwen3")
    if config.model_type not in known:
        raise BaseModelError(f"architecture {config.model_type!r} can't be served; known: {', '.join(known)}")
    if config.hidden_act != "silu":
        raise BaseModelError(f"hidden_act {config.hidden_act!r} can't be served; only silu")


def _geometry(model: Any, max_context: int | None) -> Geometry:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    longest = _longest_context(config)
    return Geometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head=head,
        inner=config.intermediate_size,
        vocab=model.lm_head.weight.shape[0],
        eps=float(config.rms_norm_eps),
        max_context=min(longest, max_context or longest),
    )


def _longest_context(config: Any) -> int:
    """Positions up to which full attention with one fixed rotary table is exact."""
    longest = int(config.max_position_embeddings)
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        longest = min(longest, int(rope["original_max_position_embeddings"]))
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if window and (windowed or config.model_type == "mistral"):
        longest = min(longest, int(window))
    return longest


def _rotary_tables(model: Any, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """transformers' own cos and sin in fp32, whatever the scaling type; the two halves are equal."""
    device = model.model.embed_tokens.weight.device
    positions = torch.arange(geometry.max_context, device=device)[None]
    probe = torch.empty(0, dtype=torch.float32, device=device)
    cos, sin = model.model.rotary_emb(probe, positions)
    half = geometry.head // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _read_layer(layer: Any, kernels: Kernels, *, release: bool) -> LayerWeights:
    attention = layer.self_attn
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        q_norm=None if q_norm is None else q_norm.weight.detach(),
        k_norm=None if k_norm is None else k_norm.weight.detach(),
        projections={
            name: _read_projection([(path, layer.get_submodule(path)) for path in paths], kernels, release=release)
            for name, paths in PROJECTIONS.items()
        },
    )


def _read_projection(modules: list[tuple[str, Any]], kernels: Kernels, *, release: bool) -> Projection:
    parts = [read_nf4(module, path) for path, module in modules]
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + part.shape[0])
    bias = None
    if any(module.bias is not None for _, module in modules):
        pieces = [
            torch.zeros(part.shape[0], device=part.packed.device) if module.bias is None else module.bias.detach()
            for part, (_, module) in zip(parts, modules, strict=True)
        ]
        bias = torch.cat(pieces)
    if release:
        for _, module in modules:
            module.weight = None
    return Projection(weight=kernels.prepare(fuse(parts)), bias=bias, offsets=tuple(offsets))
