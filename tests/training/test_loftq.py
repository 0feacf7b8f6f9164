"""LoftQ's start: nearer to the unquantised base than NF4 alone, and found without a full decomposition."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from onebase.base_model import dequantized, load_base
from onebase.bases import resolve_base
from onebase.errors import RecipeError
from onebase.home import Home
from onebase_training import lora
from onebase_training.config import LoraConfig
from onebase_training.loftq import best_low_rank, start_from_rounding_error
from real_process import prepare_home
from tiny_base import NAME

pytestmark = pytest.mark.slow


def test_loftq_starts_from_the_best_low_rank_image_of_what_nf4_rounded_away(base_home: Home) -> None:
    spec = resolve_base(base_home, NAME)
    base = load_base(spec, compute_dtype="float32")
    model = lora.attach_adapter(base, LoraConfig(r=4, alpha=8))
    original = load_file(spec.path / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    lost = original - dequantized(layer.base_layer, torch.float32)

    assert start_from_rounding_error(model, base) == 14

    correction = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    smallest_possible = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(lost - correction), smallest_possible, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1200, 900), (640, 2000)])
def test_loftqs_search_in_large_matrices_finds_nearly_all_that_the_full_decomposition_would(
    shape: tuple[int, int],
) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # the flattest spectrum: the worst case
    full = torch.linalg.svdvals(noise)[:8].square().sum()

    a, b = best_low_rank(noise, 8)
    again, _ = best_low_rank(noise, 8)

    assert (a.shape, b.shape) == ((8, shape[1]), (shape[0], 8))
    assert 0.99 < torch.linalg.norm(b @ a).square() / full < 1.0001
    torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-3, atol=0)
    assert torch.equal(a, again)


def test_loftq_brings_smollm2_nearer_to_its_unquantised_self(tmp_path: Path) -> None:
    spec = resolve_base(prepare_home(tmp_path / "home"), "SmolLM2-135M-Instruct")
    base = load_base(spec, compute_dtype="float32")
    ids = torch.tensor([base.tokenizer.encode("A captain has to know the wind, the tide and his crew.")])
    original = transformers.AutoModelForCausalLM.from_pretrained(spec.path, dtype=torch.float32)
    model = lora.attach_adapter(base, LoraConfig(r=16, alpha=16))

    def error() -> float:
        with torch.no_grad():
            return float((model(input_ids=ids).logits - original(input_ids=ids).logits).square().mean())

    plain = error()

    assert start_from_rounding_error(model, base) == 7 * 30
    assert error() < 0.9 * plain


def test_loftq_says_so_when_the_bases_files_lack_a_layer(base_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(resolve_base(base_home, NAME), compute_dtype="float32")
    model = lora.attach_adapter(base, LoraConfig(r=4))
    monkeypatch.setattr("onebase_training.loftq.weight_files", lambda _: [])

    with pytest.raises(RecipeError, match=r"lora\.init: loftq needs the base's 16-bit weights"):
        start_from_rounding_error(model, base)


def test_a_dora_on_loftqs_start_is_the_layer_that_it_starts_from(base_home: Home) -> None:
    base = load_base(resolve_base(base_home, NAME), compute_dtype="float32")
    model = lora.attach_adapter(base, LoraConfig(r=4, use_dora=True))
    start_from_rounding_error(model, base)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    whole = dequantized(layer.base_layer, torch.float32) + (
        layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    x = torch.randn(3, whole.shape[1])

    torch.testing.assert_close(layer(x), x @ whole.T, rtol=1e-4, atol=1e-4)
