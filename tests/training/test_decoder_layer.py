"""The layer written out whole against transformers' and PEFT's own, by loss and gradients; on the CPU's twins here,
on Triton's kernels in tests/gpu/test_training_ops.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gradients import assert_same, loss_and_gradients, make_rows
from onebase.base_model import load_base
from onebase.bases import resolve_base
from onebase.home import Home
from onebase_training import attention, layer_ops, lora
from onebase_training.batches import collate, token_weights
from onebase_training.config import LoraConfig
from onebase_training.decoder_layer import DecoderLayerForward
from onebase_training.fuse import fuse
from onebase_training.fuse_layers import fuse_layers
from onebase_training.linear_group import LinearGroup
from onebase_training.objective import Objective
from onebase_training.recompute import Recompute
from tiny_base import NAME

pytestmark = pytest.mark.slow


def objective(
    home: Home, *, whole: bool, checkpointing: bool = False, held: bool = False, **settings: Any
) -> Objective:
    """The tiny base with a LoRA whose B is not zero, in fp32; `whole`: with layers written out."""
    base = load_base(resolve_base(home, NAME), compute_dtype="float32")
    base.model.config._attn_implementation = attention.register()
    lora.checkpoint_activations(base, checkpointing)
    lora.keep_dequantized(base, held)
    torch.manual_seed(1)
    model = lora.attach_adapter(base, LoraConfig(**{"r": 4, "alpha": 8, **settings}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    fuse(model, torch.float32)
    if whole:
        assert fuse_layers(model, torch.float32) == len(base.model.model.layers)
    return Objective(model, Recompute(base.model, None)).train()


def batch(packing: bool) -> list[Any]:
    rows = make_rows(7, 20, 13)
    return [collate(rows, token_weights(rows, "tokens"), packing=packing, pad_id=0)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": ("o_proj", "down_proj"), "layers": (1,)},
        {"target_modules": "all-linear", "rank_pattern": {"k_proj": 20}, "alpha_pattern": {"k_proj": 3}},
    ],
)
def test_a_layer_written_out_changes_no_number(base_home: Home, settings: Any, packing: bool) -> None:
    plain = loss_and_gradients(objective(base_home, whole=False, **settings), batch(packing))

    assert_same(loss_and_gradients(objective(base_home, whole=True, **settings), batch(packing)), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_that_computes_again_has_the_gradients_of_one_that_keeps(base_home: Home, dropout: float) -> None:
    """With dropout too: the same values are dropped the second time."""
    target = objective(base_home, whole=True, target_modules="all-linear", dropout=dropout)
    found = []
    for kept in (0, 1, 2):
        assert target.recompute is not None
        target.recompute.keep(kept)
        torch.manual_seed(3)
        found.append(loss_and_gradients(target, batch(packing=True)))

    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_dropout_differs_between_steps_and_not_in_evaluation(base_home: Home) -> None:
    target = objective(base_home, whole=True, target_modules="all-linear", dropout=0.3)
    torch.manual_seed(3)

    def loss() -> float:
        with torch.no_grad():
            return float(target(batch(packing=True)[0]).loss)

    assert loss() != loss()
    target.eval()
    assert loss() == loss()


def test_transformers_checkpoints_are_taken_over(base_home: Home) -> None:
    target = objective(base_home, whole=True, checkpointing=True)

    layers = target.model.get_base_model().model.layers

    assert all(isinstance(layer.forward, DecoderLayerForward) and layer.forward.recompute for layer in layers)
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_with_the_adapter_off_or_a_cache_the_layer_goes_its_own_way(base_home: Home) -> None:
    target = objective(base_home, whole=True).eval()
    plain = objective(base_home, whole=False).eval()
    ids = torch.arange(5, 15)[None]

    with torch.no_grad(), target.model.disable_adapter(), plain.model.disable_adapter():
        torch.testing.assert_close(target.model(ids).logits, plain.model(ids).logits)
    with torch.no_grad():
        made = [one.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for one in (target, plain)]
    assert torch.equal(*made)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"held": True}])
def test_another_form_keeps_its_own_way(base_home: Home, settings: Any) -> None:
    target = objective(base_home, whole=False, **settings)

    assert fuse_layers(target.model, torch.float32) == 0


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_way_back_through_dropout_is_the_adjoint_of_the_way_there(dropout: float) -> None:
    """shrink is linear in x and in A: <grad, shrink(x)> is <x's gradient, x> and <A's gradient, A>."""
    torch.manual_seed(0)
    x, a = torch.randn(50, 24, dtype=torch.float64), torch.randn(3, 16, 24, dtype=torch.float64)
    scales = [0.5, 2.0, 1.0]
    grad = torch.randn(50, 48, dtype=torch.float64)

    there = (layer_ops.shrink(x, a, scales, dropout, 7) * grad).sum()
    grad_x = torch.zeros_like(x)
    grad_a = layer_ops.shrink_back(grad_x, x, None, grad, a, scales, dropout, 7)

    torch.testing.assert_close((grad_x * x).sum(), there)
    torch.testing.assert_close((grad_a * a.flatten(0, 1)).sum(), there)


def test_a_group_adds_biases() -> None:
    from onebase_training.linear_group import Linear

    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    biases = [torch.randn(3, dtype=torch.float64), None]

    def source(weight: Tensor) -> Any:
        return lambda out: out.copy_(weight)

    group = LinearGroup(
        [Linear(source(w), (len(w), 4), b) for w, b in zip(weights, biases, strict=True)], 0.0, torch.float64
    )
    x = torch.randn(5, 4, dtype=torch.float64)

    y, _ = group.forward(x, None)

    expected = torch.cat([torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=1)
    torch.testing.assert_close(y, expected)
