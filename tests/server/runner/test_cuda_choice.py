"""Which kernels a CUDA machine gets when ours can't be built, and weights that are read without being held twice."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from nf4_weights import exact, random_weight, relative_error  # noqa: E402
from onebase_server.engine import runner_cuda  # noqa: E402
from onebase_server.engine.weights import PROJECTIONS, read_weights  # noqa: E402
from onebase_server.kernels.cuda_bnb import BnbKernels  # noqa: E402
from onebase_server.kernels.cuda_build import CudaBuildError  # noqa: E402
from onebase_server.kernels.torch_ops import TorchKernels, dequantize  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

pytestmark = pytest.mark.slow

CONFIG = SimpleNamespace(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)


class Uncompiled:
    """Our kernels on a machine whose compiler fails, at once or for the model's heads."""

    at_once = True

    def __init__(self, cache_dir: Path | None) -> None:
        if self.at_once:
            raise CudaBuildError("NVRTC could not compile a kernel for sm_99")

    def compile_attention(self, head: int, group: int) -> None:
        assert (head, group) == (64, 2)
        raise CudaBuildError("NVRTC could not compile a kernel for sm_99")


@pytest.mark.parametrize("fails", ["compiler", "attention", "no NVRTC"])
def test_bitsandbytes_multiplies_where_our_kernels_can_not_be_built(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner_cuda, "available", lambda: fails != "no NVRTC")
    monkeypatch.setattr(runner_cuda, "CudaKernels", Uncompiled)
    monkeypatch.setattr(Uncompiled, "at_once", fails == "compiler")
    with caplog.at_level(logging.WARNING):
        assert isinstance(runner_cuda.cuda_kernels(CONFIG, None), BnbKernels)
    assert "bitsandbytes" in caplog.text
    assert ("sm_99" in caplog.text) == (fails != "no NVRTC")


def test_plain_torch_multiplies_where_bitsandbytes_is_missing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_cuda, "available", lambda: False)
    monkeypatch.setattr(runner_cuda, "has_bitsandbytes", lambda: False)
    assert type(runner_cuda.cuda_kernels(CONFIG, None)) is TorchKernels


def test_bitsandbytes_kernels_multiply_by_the_weights_values() -> None:
    kernels, weight = BnbKernels(), random_weight(96, 128, "cpu")
    prepared = kernels.prepare(weight)
    for tokens in (1, 5):
        x = torch.randn(tokens, 128).bfloat16()
        assert relative_error(kernels.nf4_matmul(x, prepared), x.double() @ exact(weight).T) < 6e-3
    wide = torch.randn(3, 128)
    assert relative_error(kernels.nf4_matmul(wide, prepared), wide.double() @ exact(weight).T) < 1e-5


def test_a_released_model_gives_its_weights_away_and_the_read_ones_are_the_same(models: Path) -> None:
    kept = read_weights(tiny_model(models, "qwen2", torch.bfloat16), TorchKernels())
    model = tiny_model(models, "qwen2", torch.bfloat16)
    read = read_weights(model, TorchKernels(), release=True)
    modules = [
        layer.get_submodule(path) for layer in model.model.layers for each in PROJECTIONS.values() for path in each
    ]
    assert [module.weight for module in modules] == [None] * len(modules)
    for one, other in zip(kept.layers, read.layers, strict=True):
        for name, projection in one.projections.items():
            again = other.projections[name]
            values = [dequantize(each.weight, torch.float32) for each in (projection, again)]
            assert torch.equal(*values)
            assert (projection.bias is None) == (again.bias is None)
