"""Zeroed tensors for what every step reads: on a CPU they ask for huge pages before the first touch."""

import torch
from torch import Tensor

from onebase.huge_pages import prefer_huge_pages


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor.zero_()
