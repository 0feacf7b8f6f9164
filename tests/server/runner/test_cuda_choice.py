"""Which kernels a CUDA machine gets when ours can't be built, and weights that are read without being held twice."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from nf4_weights import exact, random_weight, relative_error  # noqa: E402
from onebase_server.engine import build_cuda  # noqa: E402
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
    monkeypatch.setattr(build_cuda, "available", lambda: fails != "no NVRTC")
    monkeypatch.setattr(build_cuda, "CudaKernels", Uncompiled)
    monkeypatch.setattr(Uncompiled, "at_once", fails == "compiler")
    with caplog.at_level(logging.WARNING):
        assert isinstance(build_cuda.cuda_kernels(CONFIG, None), BnbKernels)
    assert "bitsandbytes" in caplog.text
    assert ("sm_99" in caplog.text) == (fails != "no NVRTC")


def test_plain_torch_multiplies_where_bitsandbytes_is_missing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cuda, "available", lambda: False)
    monkeypatch.setattr(build_cuda, "has_bitsandbytes", lambda: False)
    assert type(build_cuda.cuda_kernels(CONFIG, None)) is TorchKernels


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


def test_a_server_without_our_kernels_plans_its_pages_and_answers_as_the_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The way of a GPU up to the kernels, on a CPU: bitsandbytes multiplies, torch does the rest."""
    from onebase.base_model import load_base
    from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner
    from onebase_server.loading import make_cuda_runner
    from onebase_server.settings import load_settings
    from step_driver import Driver, Sequence
    from tiny_base import tiny_base

    home, spec = tiny_base(tmp_path, hidden=64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4_000_000_000, 8_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 1_500_000_000)
    settings = load_settings({"ONEBASE_HOME": str(home.root), "ONEBASE_ADAPTER_SLOTS": "2"})
    config = RunnerConfig(num_slots=2, max_lora_rank=8, max_batch_sequences=4, max_context=128)
    base, own = load_base(spec), load_base(spec)
    with caplog.at_level(logging.INFO):
        runner, shared = make_cuda_runner(base, config, settings)
    assert isinstance(runner, TorchRunner)
    assert shared == {"device": "cpu"}
    assert runner.limits.num_pages * 16 == 4 * 128, "as much as all sequences could fill"
    assert "planned:    1.50 GB  weights" in caplog.text
    assert base.model.model.layers[0].mlp.up_proj.weight is None

    twin = TorchRunner(
        read_weights(own.model, TorchKernels(), 128), TorchKernels(), config, eos_token_ids=base.tokenizer.eos_ids
    )
    drivers = [Driver(one) for one in (runner, twin)]
    ours, theirs = (driver.logits(driver.add(Sequence([1, 30, 41, 52, 63]))) for driver in drivers)
    assert relative_error(ours, theirs.double()) < 0.03
