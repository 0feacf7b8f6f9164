"""Drawing tokens in C++: the CPU's `Chooser`. Parameters cross as one array of structs; a row is one thread's work."""

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase_server.engine.runner import SampleRow
from onebase_server.engine.sampler import Chooser, is_greedy, uniforms
from onebase_server.kernels import cpu_abi
from onebase_server.kernels.cpu_ops import CpuKernels

_DRAW = np.dtype(
    [
        ("uniform", "f8"),
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("top_k", "i4"),
        ("greedy", "i4"),
        ("padding", "i4"),
    ]
)
"""cpu_abi.Draw as numpy sees it."""


def cpu_chooser(kernels: CpuKernels) -> Chooser:
    """For the sampler: logits [R, V] fp32 on the CPU, contiguous."""

    assert _DRAW.itemsize == ctypes.sizeof(cpu_abi.Draw)

    def choose(logits: Tensor, rows: list[SampleRow]) -> NDArray[np.int64]:
        draws = np.zeros(len(rows), dtype=_DRAW)
        for i, row in enumerate(rows):
            p = row.sampling
            draws[i] = (0.0, p.temperature, p.top_p, p.min_p, p.top_k, is_greedy(p), 0)
        if not draws["greedy"].all():
            draws["uniform"] = uniforms(rows)
        tokens = np.empty(len(rows), dtype=np.int32)
        kernels.library.onebase_sample(
            logits.data_ptr(),
            len(rows),
            logits.shape[1],
            draws.ctypes.data_as(ctypes.c_void_p),
            torch.get_num_threads(),
            tokens.ctypes.data_as(ctypes.c_void_p),
        )
        return tokens.astype(np.int64)

    return choose
