"""Tiny models, the backends that can run them here, and runners over both."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny models are saved once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C++ kernels are compiled once."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def make_runner(models: Path, kernel_cache: Path) -> Callable[..., object]:
    """`make_runner(name, backend, dtype)` with backend "torch", or a compiler target for the C++ kernels."""
    import torch

    from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner
    from onebase_server.engine.weights import read_weights
    from onebase_server.kernels.cpu_build import load_library
    from onebase_server.kernels.cpu_ops import CpuKernels
    from onebase_server.kernels.torch_ops import TorchKernels
    from tiny_models import tiny_model

    def make(name: str, backend: str, dtype: torch.dtype = torch.float32, **config: int) -> TorchRunner:
        kernels = TorchKernels()
        if backend != "torch":
            library = load_library(kernel_cache, march=backend)
            if library is None:
                pytest.skip("no C++ compiler here")
            kernels = CpuKernels(library, dtype)
        settings = RunnerConfig(**{"num_pages": 128, "num_slots": 4, "max_lora_rank": 16, **config})
        weights = read_weights(tiny_model(models, name, dtype), kernels)
        return TorchRunner(weights, kernels, settings, eos_token_ids=frozenset({2}))

    return make
