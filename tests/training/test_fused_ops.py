"""The written-out gradients against autograd, in fp64, and against finite differences."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onebase_training.attention import attend
from onebase_training.fused_ops import FrozenLinear, LoraLinear, RmsNorm, Rotary, SwiGlu
from onebase_training.objective import cross_entropy
from onebase_training.packed_cpu import PackedCausalAttention

pytestmark = pytest.mark.slow

lora_linear: Any = LoraLinear.apply
frozen_linear: Any = FrozenLinear.apply
rms_norm: Any = RmsNorm.apply
rotary: Any = Rotary.apply
swiglu: Any = SwiGlu.apply
packed: Any = PackedCausalAttention.apply
Dispatch: Any = torch.utils._python_dispatch.TorchDispatchMode


def values(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def same_with_gradients(ours: Any, plain: Any, *inputs: Tensor) -> None:
    """Outputs and all gradients agree with the plain expression's, and with finite differences."""
    out, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected)
    grad = values(*out.shape, grad=False, seed=9)
    learning = [x for x in inputs if x.requires_grad]
    for got, want in zip(
        torch.autograd.grad(out, learning, grad), torch.autograd.grad(expected, learning, grad), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(ours, inputs)


def test_lora_linear() -> None:
    weight, bias = values(5, 6, grad=False), values(5, grad=False)
    x, a, b = values(2, 3, 6), values(2, 6), values(5, 2)

    same_with_gradients(
        lambda x, a, b: lora_linear(x, lambda: weight, bias, a, b, 1.5),
        lambda x, a, b: F.linear(x, weight, bias) + 1.5 * F.linear(F.linear(x, a), b),
        x,
        a,
        b,
    )


def test_lora_linear_drops_from_the_adapters_input_alone() -> None:
    weight, bias = values(5, 6, grad=False), values(5, grad=False)
    x, a, b = values(2, 3, 6), values(2, 6), values(5, 2)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = lora_linear(x, lambda: weight, bias, a, b, 1.5, 0.4)
        return out

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)
        mask = torch.native_dropout(torch.ones(6, 6, dtype=torch.float64), 0.4, True)[0].view(2, 3, 6)
        assert {0.0} < set(mask.flatten().tolist())
        return F.linear(x, weight, bias) + 1.5 * F.linear(F.linear(x * mask, a), b)

    same_with_gradients(ours, plain, x, a, b)


def test_frozen_linear() -> None:
    weight, bias = values(5, 6, grad=False), values(5, grad=False)

    same_with_gradients(
        lambda x: frozen_linear(x, lambda: weight, bias), lambda x: F.linear(x, weight, bias), values(2, 3, 6)
    )


def test_a_young_adapters_small_share_is_not_rounded_away_in_bf16() -> None:
    """Added behind a rounded W x, more than half of it would be lost (bf16 has 8 bits)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 96, generator=generator), 0.05 * torch.randn(80, 96, generator=generator)
    a, b = torch.randn(8, 96, generator=generator) / 96**0.5, 1e-4 * torch.randn(80, 8, generator=generator)
    x, weight = x.bfloat16(), weight.bfloat16()
    share = (x.double() @ a.double().T) @ b.double().T

    out = lora_linear(x, lambda: weight, None, a, b, 1.0).double() - x.double() @ weight.double().T

    kept = (out * share).sum() / share.square().sum()
    assert 0.9 < kept.item() < 1.1
    rounded_first = ((x @ weight.T) + share.bfloat16()).double() - x.double() @ weight.double().T
    assert (rounded_first * share).sum() / share.square().sum() < 0.8


def test_rms_norm_keeps_a_wide_stream_and_narrows_its_result() -> None:
    x = torch.randn(3, 6, requires_grad=True)

    out = rms_norm(x, torch.ones(6, dtype=torch.bfloat16), 1e-5, torch.bfloat16)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)

    assert (out.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), F.rms_norm(x, (6,), None, 1e-5), rtol=1e-2, atol=1e-2)


def test_rms_norm() -> None:
    weight = values(6, grad=False)

    same_with_gradients(
        lambda x: rms_norm(x, weight, 1e-5, torch.float64), lambda x: F.rms_norm(x, (6,), weight, 1e-5), values(2, 3, 6)
    )


def test_swiglu() -> None:
    same_with_gradients(swiglu, lambda gate, up: F.silu(gate) * up, values(3, 5), values(3, 5, seed=1))


def test_rotary() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = values(1, 4, 3, grad=False).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def plain(x: Tensor) -> Tensor:
        rotated: Tensor = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0]
        return rotated.transpose(1, 2)

    same_with_gradients(lambda x: rotary(x, cos, sin), plain, values(1, 4, 2, 6))


def one_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, heads, D] through torch's own attention."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True)
    return out.transpose(0, 1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_is_attention_of_each_row_alone(kv_heads: int) -> None:
    borders = (0, 3, 4, 9)
    query, key, value = values(9, 4, 6), values(9, kv_heads, 6), values(9, kv_heads, 6, seed=2)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([one_row(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(borders)])

    same_with_gradients(lambda q, k, v: packed(q, k, v, borders, 6**-0.5), plain, query, key, value)


def test_long_rows_go_through_torchs_attention_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    borders = (0, 5, 8)
    query, key, value = values(1, 8, 4, 6), values(1, 8, 2, 6), values(1, 8, 2, 6, seed=2)
    short = attend(query, key, value, 6**-0.5, borders)
    monkeypatch.setattr("onebase_training.attention.MAX_LENGTH", 2)

    torch.testing.assert_close(attend(query, key, value, 6**-0.5, borders), short)


def test_padded_rows_are_attended_one_by_one() -> None:
    query, key, value = values(2, 4, 4, 6), values(2, 4, 2, 6), values(2, 4, 2, 6, seed=2)

    out = attend(query, key, value, 6**-0.5, None)

    for row in range(2):
        torch.testing.assert_close(out[row], one_row(query[row], key[row], value[row]))


def test_chunked_cross_entropy_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    head, targets = values(11, 6, grad=False), torch.tensor([3, 0, 10, 5, 5])
    hidden, weights = values(5, 6), values(5, grad=False, seed=3).abs()
    expected = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    (gradient,) = torch.autograd.grad(expected, hidden)

    for logits_at_once in (11, 22, 10_000):  # chunks of 1, 2 and all rows
        monkeypatch.setattr("onebase_training.objective.CHUNK_LOGITS", logits_at_once)
        losses = cross_entropy(hidden, head, targets, weights)

        torch.testing.assert_close(losses.loss, expected, check_dtype=False)
        torch.testing.assert_close(torch.autograd.grad(losses.loss, hidden)[0], gradient, rtol=1e-5, atol=1e-6)
        assert losses.correct.item() == ((hidden @ head.T).argmax(1) == targets).sum().item()


def test_logits_never_stand_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made has a chunk's logits, not all rows'."""
    monkeypatch.setattr("onebase_training.objective.CHUNK_LOGITS", 4 * 1000)
    head, hidden = values(1000, 4, grad=False), values(64, 4)
    sizes: list[int] = []

    class Watch(Dispatch):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
            return out

    watch: Any = Watch
    with watch():
        loss: Any = cross_entropy(hidden, head, torch.zeros(64, dtype=torch.int64), torch.ones(64)).loss
        loss.backward()

    assert max(sizes) == 4 * 1000
