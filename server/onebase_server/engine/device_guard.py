"""Around every call of a runner that touches its device: the calling thread is bound to it, and its faults get a name.

CUDA's current device belongs to a thread, and raw launches, streams and events follow it; the base is loaded by one
thread and served by another. Knows neither steps nor adapters.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from onebase_server.engine.runner import DeviceLost
from onebase_server.kernels.cuda_build import CudaBuildError

_FAULTS: tuple[type[Exception], ...] = (getattr(torch, "AcceleratorError", RuntimeError), CudaBuildError)
"""What torch and the driver raise of an illegal access or a failed launch; older torch has no class for it."""


class DeviceGuard:
    """Of one runner. On a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._thread = threading.local()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A device that faulted does not come back: DeviceLost. Running out of memory fails this step only."""
        if self._is_cuda:
            self._bind()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except _FAULTS as error:
            if not self._is_cuda:
                raise
            raise DeviceLost(str(error)) from error

    @contextmanager
    def loading(self) -> Iterator[None]:
        """As `step`, but there is no step to fail, and the adapter is not to blame: no memory is DeviceLost too."""
        try:
            with self.step():
                yield
        except torch.OutOfMemoryError as error:
            if not self._is_cuda:
                raise
            raise DeviceLost(
                f"no memory on {self._device} to load an adapter, though it was set apart at the start: something else "
                f"on the device has taken it; lower ONEBASE_KV_TOKENS or end that ({error})"
            ) from error

    def _bind(self) -> None:
        if not getattr(self._thread, "is_bound", False):
            torch.cuda.set_device(self._device)
            self._thread.is_bound = True
