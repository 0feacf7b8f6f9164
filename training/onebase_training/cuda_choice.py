"""Whether the Triton operations run for a tensor: on CUDA, in bf16 or fp32, where Triton is. Else plain torch."""

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float32)


def triton_for(*tensors: Tensor) -> ModuleType | None:
    """The module `triton_ops`, or None where the plain operations are to be used."""
    if not all(t.is_cuda and t.dtype in _DTYPES for t in tensors):
        return None
    return _triton()


def triton_lora_for(*tensors: Tensor) -> ModuleType | None:
    """`triton_lora`, likewise."""
    if triton_for(*tensors) is None:
        return None
    from onebase_training import triton_lora

    return triton_lora


def triton_unpack_for(*tensors: Tensor) -> ModuleType | None:
    """`triton_unpack`, for packed bytes of any type."""
    if not all(t.is_cuda for t in tensors) or _triton() is None:
        return None
    from onebase_training import triton_unpack

    return triton_unpack


@cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from onebase_training import triton_ops

    return triton_ops
