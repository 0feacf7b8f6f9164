"""What must not change a run's numbers: packing, accumulation, fusing, held weights, checkpointed activations."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradients import assert_same, loss_and_gradients, make_rows
from onebase.base_model import LoadedBase, load_base
from onebase.bases import resolve_base
from onebase.errors import RecipeError
from onebase.home import Home
from onebase_training import attention, lora
from onebase_training.batches import collate, token_weights
from onebase_training.config import ComputeConfig, LoraConfig, TrainConfig
from onebase_training.fuse import fuse
from onebase_training.objective import Objective
from onebase_training.plan import make_plan
from onebase_training.recompute import Recompute, layers_that_fit
from onebase_training.rows import Row
from onebase_training.trainer import StepDataset
from tiny_base import NAME

pytestmark = pytest.mark.slow


def objective(home: Home, *, fused: bool = True, held: bool = True, seed: int = 1, **settings: Any) -> Objective:
    """The tiny base with a LoRA whose B is not zero, in fp32."""
    base = load_base(resolve_base(home, NAME), compute_dtype="float32")
    base.model.config._attn_implementation = attention.register()
    lora.checkpoint_activations(base, settings.pop("checkpointing", False))
    lora.keep_dequantized(base, held)
    torch.manual_seed(seed)
    model = lora.attach_adapter(base, LoraConfig(r=4, alpha=8, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if fused:
        assert fuse(model, torch.float32) > 0
    return Objective(model).train()


def test_pitfall_9_packed_rows_give_the_loss_and_gradients_of_rows_alone(base_home: Home) -> None:
    target, rows = objective(base_home), make_rows(7, 20, 13, 2)
    weights = token_weights(rows, "tokens")
    packed = [collate(rows, weights, packing=True, pad_id=0)]
    alone = [collate([row], [weight], packing=True, pad_id=0) for row, weight in zip(rows, weights, strict=True)]
    padded = [collate(rows, weights, packing=False, pad_id=0)]

    expected = loss_and_gradients(target, alone)

    assert_same(loss_and_gradients(target, packed), expected)
    assert_same(loss_and_gradients(target, padded), expected)


def test_pitfall_9_another_row_in_the_pack_moves_no_logit(base_home: Home) -> None:
    target, rows = objective(base_home), make_rows(9, 12)
    other = make_rows(9, seed=5)[0]

    def hidden(first: Row) -> Tensor:
        batch = collate([first, rows[1]], [1.0, 1.0], packing=True, pad_id=0)
        decoder = target.model.get_base_model().model
        out = decoder(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, borders=batch.borders)
        behind: Tensor = out.last_hidden_state[0, 9:]
        return behind

    with torch.no_grad():
        assert torch.equal(hidden(rows[0]), hidden(other))


def test_pitfall_1_padding_with_the_eos_id_itself_changes_nothing(base_home: Home) -> None:
    target, rows = objective(base_home), make_rows(7, 20)
    weights = token_weights(rows, "tokens")
    eos = 2
    rows[0].ids[-1] = eos

    forced = collate(rows, weights, packing=False, pad_id=eos)

    assert (forced.targets == eos).any(), "the eos that ends a row is learnt though it looks like padding"
    assert_same(
        loss_and_gradients(target, [forced]),
        loss_and_gradients(target, [collate(rows, weights, packing=False, pad_id=0)]),
    )


@pytest.mark.parametrize("packing", [True, False])
def test_pitfall_10_a_step_is_the_same_however_it_is_cut(base_home: Home, packing: bool) -> None:
    """4 rows of unequal length at once, or one by one: the mean is over tokens, not over micro-batches."""
    target, rows = objective(base_home), make_rows(30, 5, 12, 3)
    config = TrainConfig(epochs=1, batch_size=4, packing=packing)
    plan = make_plan([1.0] * 4, config)

    def step(tokens_at_once: int) -> list[Any]:
        return StepDataset(rows, plan, config, tokens_at_once=tokens_at_once, pad_id=0)[0]

    whole, cut = step(10_000), step(1)

    assert (len(whole), len(cut)) == (1, 4)
    assert_same(loss_and_gradients(target, whole), loss_and_gradients(target, cut))


def test_the_heaviest_micro_batch_of_all_steps_is_found(base_home: Home) -> None:
    """Not the one with the longest row: three rows of 20 weigh more than one of 30."""
    rows = make_rows(30, 20, 20, 20, 5)
    config = TrainConfig(epochs=1, batch_size=3)
    plan = replace(make_plan([1.0] * 5, config), steps=((0, 4), (1, 2, 3)))

    heaviest = StepDataset(rows, plan, config, tokens_at_once=60, pad_id=0).heaviest()

    assert heaviest.borders == (0, 20, 40, 60)


def test_pitfall_10_the_loss_is_the_mean_over_learnt_tokens(base_home: Home) -> None:
    target, rows = objective(base_home), make_rows(30, 5, 12)
    batch = collate(rows, token_weights(rows, "tokens"), packing=True, pad_id=0)

    losses = target(batch)

    assert losses.loss.item() == pytest.approx(losses.nll_sum.item() / sum(row.supervised for row in rows), rel=1e-5)


def test_the_seeds_normalisation_is_the_mean_of_the_rows_means(base_home: Home) -> None:
    target, rows = objective(base_home), make_rows(30, 5, 12)
    alone = [target(collate([row], [1.0], packing=True, pad_id=0)).nll_sum.item() / row.supervised for row in rows]

    batch = collate(rows, token_weights(rows, "rows"), packing=True, pad_id=0)

    assert target(batch).loss.item() == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_fusing_changes_no_number(base_home: Home, targets: Any) -> None:
    rows = make_rows(7, 20, 13)
    batch = [collate(rows, token_weights(rows, "tokens"), packing=True, pad_id=0)]

    plain = loss_and_gradients(objective(base_home, fused=False, target_modules=targets), batch)

    assert_same(loss_and_gradients(objective(base_home, target_modules=targets), batch), plain)
    assert_same(loss_and_gradients(objective(base_home, held=False, target_modules=targets), batch), plain)
    assert_same(loss_and_gradients(objective(base_home, checkpointing=True, target_modules=targets), batch), plain)


def test_what_is_not_known_keeps_its_own_forward(base_home: Home) -> None:
    """DoRA goes PEFT's way, and still learns."""
    rows = make_rows(7, 20)
    batch = [collate(rows, token_weights(rows, "tokens"), packing=True, pad_id=0)]

    _, gradients = loss_and_gradients(objective(base_home, use_dora=True), batch)

    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_dropout_is_drawn_anew_each_time_and_left_out_of_evaluation(base_home: Home) -> None:
    target, rows = objective(base_home, dropout=0.5), make_rows(7, 20)
    batch = collate(rows, token_weights(rows, "tokens"), packing=True, pad_id=0)
    without = objective(base_home)(batch).loss.item()

    torch.manual_seed(0)
    first, second = target(batch).loss.item(), target(batch).loss.item()
    torch.manual_seed(0)

    assert len({first, second, without}) == 3
    assert target(batch).loss.item() == first
    assert target.eval()(batch).loss.item() == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_layers_that_keep_their_activations_change_no_number_and_are_not_computed_twice(
    base_home: Home, kept: int
) -> None:
    rows = make_rows(7, 20, 13)
    batch = [collate(rows, token_weights(rows, "tokens"), packing=True, pad_id=0)]
    target = objective(base_home, checkpointing=True, dropout=0.2)
    layers = target.model.get_base_model().model.layers
    calls: list[int] = []
    for index, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    plain = objective(base_home, dropout=0.2)
    torch.manual_seed(0)
    expected = loss_and_gradients(plain, batch)

    Recompute(target.model.get_base_model(), None).keep(kept)
    torch.manual_seed(0)
    found = loss_and_gradients(target, batch)

    assert_same(found, expected)
    assert sorted(calls) == sorted([*range(2), *range(2 - kept)])


def test_as_many_layers_keep_their_activations_as_fit_below_the_limit() -> None:
    assert layers_that_fit(limit=14e9, peak_without=7e9, per_layer=0.35e9, layers=32) == 20
    assert layers_that_fit(limit=80e9, peak_without=7e9, per_layer=0.35e9, layers=32) == 32
    assert layers_that_fit(limit=6e9, peak_without=7e9, per_layer=0.35e9, layers=32) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pitfall_13_every_lora_b_has_a_gradient_after_the_first_step(base_home: Home, checkpointing: bool) -> None:
    target, rows = objective(base_home, checkpointing=checkpointing), make_rows(16)
    for name, parameter in target.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)

    _, gradients = loss_and_gradients(target, [collate(rows, token_weights(rows, "tokens"), packing=True, pad_id=0)])

    of_b = {name: gradient for name, gradient in gradients.items() if "lora_B" in name}
    assert len(of_b) == 2 * 7
    assert all(gradient.abs().sum() > 0 for gradient in of_b.values())


def test_pitfall_11_lora_is_fp32_on_a_bf16_base(base_home: Home) -> None:
    base: LoadedBase = load_base(resolve_base(base_home, NAME))
    model = lora.attach_adapter(base, LoraConfig(r=4))

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert base.model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_none_is_told(device: str) -> None:
    with pytest.raises(RecipeError, match=r"compute\.device: "):
        lora.compute_settings(ComputeConfig(device=device))


def test_held_weights_are_the_values_that_bitsandbytes_multiplies_by(base_home: Home) -> None:
    base = load_base(resolve_base(base_home, NAME))
    layer = base.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    unpacked = layer(x)

    assert lora.keep_dequantized(base, True)

    assert torch.equal(layer(x), unpacked)
