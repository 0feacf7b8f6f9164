"""Small arrays from the host to the device without a sync: the host goes on at once. Knows nothing of what they are."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INLINE_BYTES = 1 << 16
"""A driver takes so much of ordinary memory along with the command; for more it waits, unless the memory is pinned."""


def put(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device, its dtype kept. On a CPU it may share memory with the array."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return (tensor if tensor.nbytes <= _INLINE_BYTES else tensor.pin_memory()).to(device, non_blocking=True)
