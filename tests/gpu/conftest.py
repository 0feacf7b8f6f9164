"""Tests of the CUDA backend: skipped where there is no CUDA device."""

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
