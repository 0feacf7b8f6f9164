"""A Llama layer as one step of autograd: its forward and backward pass written out from end to end.

On a large GPU a step of small operations is bound by the host that starts them, not by the device. Here a layer is
some 20 kernels forward and 40 back instead of 60 and 110, and a layer that computes again (recompute.py) runs its
own forward pass, without hooks around every tensor and without the last product. Numbers as in fuse.py's way.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase_training import attention, layer_ops, row_attention
from onebase_training.linear_group import LinearGroup
from onebase_training.row_attention import Attended


@dataclass(slots=True)
class Angles:
    """cos and sin [B or 1, T, D] in the compute dtype, made once for all layers that are given the same."""

    source: Any = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    def of(self, embeddings: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.source is not embeddings or self.cos is None or self.sin is None:
            self.source = embeddings
            self.cos, self.sin = (angles.to(dtype).contiguous() for angles in embeddings)
        return self.cos, self.sin


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of a micro-batch lie: `borders` their starts and the end, over all `batch` rows of tokens."""

    batch: int
    borders: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    seeds: tuple[int | None, ...]
    """Of the dropout of qkv, o, gate_up and down: the same when a layer computes again. None: nothing is dropped."""


@dataclass(slots=True)
class Saved:
    """What lies between forward and backward, 12 to 13 values of the width a token (Llama-7B), two bytes each."""

    normed: Tensor
    scale: Tensor
    qkv: Tensor
    attended: Attended
    normed2: Tensor
    scale2: Tensor
    gate_up: Tensor
    lows: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    eps: float


class LayerMath:
    """The numbers of one layer. Hidden states are [T, H] here, fp32; matrix products in `dtype`."""

    def __init__(
        self,
        norms: tuple[Norm, Norm],
        groups: tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup],
        heads: tuple[int, int, int],
        scaling: float,
        dtype: torch.dtype,
    ) -> None:
        """`groups`: qkv, o, gate_up, down. `heads`: of queries, of keys, and the size of one."""
        self.groups = groups
        self.parameters = [p for group in groups for p in group.parameters]
        self._norm, self._norm2 = norms
        self._queries, self._keys, self._size = heads
        self._scaling, self._dtype = scaling, dtype

    def forward(self, hidden: Tensor, place: Place, *, again: bool = False) -> tuple[Tensor | None, Saved]:
        """-> (hidden, saved). `again`: only what the backward pass needs."""
        qkv_group, o_group, gate_up_group, down_group = self.groups
        renew, seeds = not again, place.seeds
        _, normed, x, scale = layer_ops.norm(hidden, None, self._norm.weight, self._norm.eps, self._dtype)
        qkv, low_qkv = qkv_group.forward(x, seeds[0], renew=renew)
        turned = self._turned(qkv, place.batch)
        layer_ops.rotate(turned, place.cos, place.sin, 1.0, turned)
        attended = row_attention.forward(*self._heads(qkv), self._scaling, place.borders)
        out, low_o = o_group.forward(attended.out.flatten(1), seeds[1], renew=renew)
        middle, normed2, x, scale2 = layer_ops.norm(hidden, out, self._norm2.weight, self._norm2.eps, self._dtype)
        gate_up, low_gate_up = gate_up_group.forward(x, seeds[2], renew=renew)
        last: Tensor | None = None
        low_down = None
        if not again:
            last, low_down = down_group.forward(layer_ops.swiglu(gate_up), seeds[3])
            last = middle + last
        elif down_group.learns:
            low_down = down_group.low(layer_ops.swiglu(gate_up), seeds[3], renew=False)
        lows = (low_qkv, low_o, low_gate_up, low_down)
        return last, Saved(normed, scale, qkv, attended, normed2, scale2, gate_up, lows)

    def backward(
        self, grad: Tensor, saved: Saved, place: Place, *, needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """-> (the gradient of hidden, and of `parameters` in their order)."""
        qkv_group, o_group, gate_up_group, down_group = self.groups
        low_qkv, low_o, low_gate_up, low_down = saved.lows
        seeds = place.seeds
        inner = layer_ops.swiglu(saved.gate_up) if down_group.learns else None
        grad_inner, of_down = down_group.backward(grad.to(self._dtype), low_down, inner, None, seeds[3])
        del inner
        assert grad_inner is not None
        grad_gate_up = layer_ops.swiglu_back(saved.gate_up, grad_inner)
        del grad_inner
        weight2 = self._norm2.weight
        grad_x, of_gate_up = gate_up_group.backward(grad_gate_up, low_gate_up, saved.normed2, weight2, seeds[2])
        del grad_gate_up
        assert grad_x is not None
        grad, narrow = layer_ops.norm_back(grad_x, saved.normed2, weight2, saved.scale2, grad)
        out = saved.attended.out
        grad_out, of_o = o_group.backward(narrow, low_o, out.flatten(1), None, seeds[1])
        assert grad_out is not None
        grad_qkv = self._attention_back(grad_out.view_as(out), saved, place)
        weight = self._norm.weight
        grad_x, of_qkv = qkv_group.backward(grad_qkv, low_qkv, saved.normed, weight, seeds[0], needs_x=needs_x)
        found = [*of_qkv, *of_o, *of_gate_up, *of_down]
        if grad_x is None:
            return None, found
        return layer_ops.norm_back(grad_x, saved.normed, weight, saved.scale, grad)[0], found

    def _attention_back(self, grad_out: Tensor, saved: Saved, place: Place) -> Tensor:
        q, k, v = self._heads(saved.qkv)
        of_q, of_k, of_v = row_attention.backward(saved.attended, grad_out, q, k, v, self._scaling, place.borders)
        grad = torch.empty_like(saved.qkv)
        for found, into in zip((of_q, of_k), self._heads(grad)[:2], strict=True):
            shape = (place.batch, -1, *found.shape[1:])
            layer_ops.rotate(found.view(shape), place.cos, place.sin, -1.0, _rows_of(into, place.batch))
        self._heads(grad)[2].copy_(of_v)
        return grad

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, heads, D] of q, k and v."""
        heads = qkv.view(len(qkv), -1, self._size)
        q, both = self._queries, self._queries + self._keys
        return heads[:, :q], heads[:, q:both], heads[:, both:]

    def _turned(self, qkv: Tensor, batch: int) -> Tensor:
        """The heads that positions turn, q's and k's, as [B, T, heads, D]."""
        heads = qkv.view(batch, -1, self._queries + 2 * self._keys, self._size)
        return heads[:, :, : self._queries + self._keys]


def _rows_of(heads: Tensor, batch: int) -> Tensor:
    """A view [B, T, heads, D] of [B * T, heads, D], whose tokens lie apart."""
    length, stride = len(heads) // batch, heads.stride()
    return heads.as_strided((batch, length, *heads.shape[1:]), (length * stride[0], *stride), heads.storage_offset())


class _Layer(torch.autograd.Function):
    """hidden [B, T, H] -> [B, T, H]. The adapters' parameters are inputs, so that autograd sends their gradients on."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: LayerMath, place: Place, recompute: bool, *parameters: Tensor
    ) -> Tensor:
        out, saved = layer.forward(hidden.flatten(0, 1), place)
        assert out is not None
        ctx.layer, ctx.place = layer, place
        ctx.saved = None if recompute else saved
        if recompute:
            ctx.save_for_backward(hidden)
        return out.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, place, saved = ctx.layer, ctx.place, ctx.saved
        if saved is None:
            _, saved = layer.forward(ctx.saved_tensors[0].flatten(0, 1), place, again=True)
        ctx.saved = None  # free at once, not when the whole graph goes
        grad_x, found = layer.backward(grad.flatten(0, 1).contiguous(), saved, place, needs_x=ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.view_as(grad), None, None, None, *found


class DecoderLayerForward:
    """Stands in for a decoder layer's forward in training's pass; with a cache or adapters off its own is taken."""

    def __init__(self, layer: nn.Module, math: LayerMath, angles: Angles, dtype: torch.dtype) -> None:
        self._layer, self._own, self._math, self._angles, self._dtype = layer, layer.forward, math, angles, dtype
        self._adapted = [module for module in layer.modules() if hasattr(module, "disable_adapters")]
        attn: Any = layer.self_attn
        self._config = attn.config
        self.recompute = False

    def __call__(self, hidden_states: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        if not self._is_training_pass(args, kwargs):
            return self._own(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        batch, length, _ = hidden_states.shape
        borders = kwargs.get("borders") or tuple(range(0, batch * length + 1, length))
        cos, sin = self._angles.of(position_embeddings, self._dtype)
        math = self._math
        seeds: tuple[int | None, ...] = (None,) * 4
        if self._layer.training and any(group.dropout for group in math.groups):
            seeds = tuple(torch.randint(1 << 31, (4,)).tolist())
        place = Place(batch, borders, cos, sin, seeds)
        recompute = self.recompute and torch.is_grad_enabled()
        return _Layer.apply(hidden_states, math, place, recompute, *math.parameters)  # type: ignore[no-untyped-call]

    def _is_training_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return (
            not args
            and kwargs.get("past_key_values") is None
            and kwargs.get("attention_mask") is None
            and self._config._attn_implementation == attention.NAME
            and not any(module.disable_adapters for module in self._adapted)
        )
