"""What a decoder layer written out whole (decoder_layer.py) is made of besides matrix products: forward and backward
of each, without autograd. One Triton kernel each on CUDA, else plain torch that says what it computes.

Nothing here knows PEFT, transformers or a model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from onebase_training.cuda_choice import triton_for, triton_lora_for


def norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [T, H] -> (x + more, normed in `dtype`, normed * weight, 1 / rms [T, 1]). More: what is added first."""
    if (triton := triton_for(x, weight)) is not None:
        if more is None:
            return x, *triton.rms_forward(x, weight, eps, dtype)
        return triton.add_rms_forward(x, more, weight, eps, dtype)  # type: ignore[no-any-return]
    total = x if more is None else x + more
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.rsqrt(total.to(wide).square().mean(-1, keepdim=True) + eps)
    normed = (total * scale).to(dtype)
    return total, normed, normed * weight.to(dtype), scale


def norm_back(grad: Tensor, normed: Tensor, weight: Tensor, scale: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """above + the gradient of `norm`'s sum: in above's dtype, and in grad's."""
    if (triton := triton_for(grad, normed)) is not None:
        return triton.rms_backward_onto(grad, normed, weight, scale, above)  # type: ignore[no-any-return]
    grad = grad * weight.to(grad.dtype)
    along = (grad * normed).mean(-1, keepdim=True)
    total = above + (grad - normed * along).to(above.dtype) * scale
    return total, total.to(grad.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2 F] -> silu(gate) * up [T, F]."""
    gate, up = gate_up.chunk(2, dim=1)
    if (triton := triton_for(gate_up)) is not None:
        return triton.swiglu_forward(gate, up)  # type: ignore[no-any-return]
    return torch.nn.functional.silu(gate) * up


def swiglu_back(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `swiglu`'s input."""
    gate, up = gate_up.chunk(2, dim=1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=1)
    if (triton := triton_for(gate_up, grad)) is not None:
        triton.swiglu_backward(gate, up, grad, (grad_gate, grad_up))
        return out
    torch.mul(torch.nn.functional.silu(gate), grad, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> None:
    """Rotary positions of x [B, T, heads, D] into `out`, which may be x; cos and sin [B or 1, T, D]."""
    if (triton := triton_for(x, cos, sin)) is not None:
        triton.rotate(x, cos, sin, sign, out)
        return
    half = x.shape[-1] // 2
    c, s = cos[..., None, :half], sin[..., None, :half] * sign
    first, second = x[..., :half].clone(), x[..., half:].clone()
    out[..., :half] = first * c - second * s
    out[..., half:] = second * c + first * s


def shrink(x: Tensor, a: Tensor, scales: Sequence[float], dropout: float, seed: int) -> Tensor:
    """x [T, K], a [modules, R, K] -> [T, modules * R]: scale * dropout(x) A^T a module."""
    if (triton := triton_lora_for(x, a)) is not None:
        return triton.shrink(x, a, scales, dropout, seed)  # type: ignore[no-any-return]
    shares = [
        _dropped(x, dropout, seed, index) @ one.T * scale
        for index, (one, scale) in enumerate(zip(a, scales, strict=True))
    ]
    return torch.cat(shares, dim=1)


def shrink_back(
    grad_x: Tensor | None,
    x: Tensor,
    gain: Tensor | None,
    grad_low: Tensor,
    a: Tensor,
    scales: Sequence[float],
    dropout: float,
    seed: int,
) -> Tensor:
    """A's gradient [modules * R, K], in fp32 at least; what `shrink`'s input gets is added to grad_x where it lies.

    The rows that `shrink` saw are x, times `gain` where given. grad_low [T, modules * R].
    """
    if (triton := triton_lora_for(x, a)) is not None:
        return triton.back(grad_x, x, gain, grad_low, a, scales, dropout, seed)  # type: ignore[no-any-return]
    rows = x if gain is None else x * gain.to(x.dtype)
    found = []
    for index, (low, one, scale) in enumerate(zip(grad_low.chunk(len(a), dim=1), a, scales, strict=True)):
        found.append((low * scale).T @ _dropped(rows, dropout, seed, index))
        if grad_x is not None:
            grad_x += _dropped(low @ one * scale, dropout, seed, index)
    return torch.cat(found).to(torch.promote_types(x.dtype, torch.float32))


def _dropped(x: Tensor, dropout: float, seed: int, index: int) -> Tensor:
    """The same values are dropped whenever seed, index and shape are the same."""
    if not dropout:
        return x
    generator = torch.Generator(x.device).manual_seed(seed + index)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= dropout
    return x * kept / (1 - dropout)
