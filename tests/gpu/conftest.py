"""Tests of the CUDA backend: skipped where there is no CUDA device."""

from dataclasses import replace

import pytest


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(20_26)


@pytest.fixture(scope="session")
def kernels(_device: None):
    from onebase_server.kernels.cuda_ops import CudaKernels

    return CudaKernels()


@pytest.fixture(scope="session")
def runners(kernels):
    """(CUDA, reference) over the same random weights."""
    from cuda_models import random_model
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner
    from onebase_server.engine.weights import Geometry
    from onebase_server.kernels.torch_ops import TorchKernels

    raw = random_model(Geometry(3, 256, 4, 2, 64, 512, 768, 1e-6, 1024), TorchKernels())
    layers = [
        replace(
            layer,
            projections={n: replace(p, weight=kernels.prepare(p.weight)) for n, p in layer.projections.items()},
        )
        for layer in raw.layers
    ]
    config = RunnerConfig(num_pages=600, num_slots=4, max_lora_rank=32, lora_rows=64, max_batch_sequences=40)
    ours = CudaRunner(replace(raw, layers=layers), kernels, config, eos_token_ids=frozenset())
    return ours, TorchRunner(raw, TorchKernels(), config, eos_token_ids=frozenset())
