"""bitsandbytes may repack a base's weights on the CPU in a forward pass without gradients; ours must stay as stored."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_an_evaluation_leaves_weights_and_gradients_as_they_were(tmp_path: Path) -> None:
    import torch

    from onebase.base_model import dequantized, linear4bit_modules, load_base
    from tiny_base import tiny_base

    base = load_base(tiny_base(tmp_path, hidden=128)[1])
    module = linear4bit_modules(base.model)["model.layers.0.mlp.gate_proj"]
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(module(x).sum(), x)[0]

    weights, before = dequantized(module, torch.float32), gradient()
    with torch.no_grad():
        base.model(torch.tensor([[1, 2, 3]]))
    assert torch.equal(dequantized(module, torch.float32), weights)
    assert torch.equal(gradient(), before)
    assert before.abs().sum() > 0
