"""Prefill: weights dequantised on a side stream one ahead of cuBLAS, into two buffers in turn.

Dequantising is bound by memory and the product by arithmetic, so that the first hides behind the second. It must not
know layers: it is given all weights in the order of their use.
"""

import torch
from torch import Tensor
from torch.nn import functional

from onebase_server.kernels.cuda_nf4 import NF4Matmul
from onebase_server.kernels.ops import NF4Weight


class DensePipeline:
    """Call with each weight of a pass, in order; out of order is right too, and slower."""

    def __init__(self, nf4: NF4Matmul, order: list[NF4Weight]) -> None:
        self._nf4 = nf4
        self._order = order
        self._index = {id(weight): i for i, weight in enumerate(order)}
        self._side = torch.cuda.Stream()
        self._buffers: list[Tensor] = []
        self._used: list[torch.cuda.Event | None] = [None, None]
        self._ready: tuple[int, torch.cuda.Event] | None = None

    def __call__(self, x: Tensor, weight: NF4Weight) -> Tensor:
        """x [T, K] @ W.T -> [T, N]."""
        index, main = self._index[id(weight)], torch.cuda.current_stream()
        if self._ready is None or self._ready[0] != index:
            self._side.wait_stream(main)
            self._start(index)
        assert self._ready is not None
        main.wait_event(self._ready[1])
        self._ready = None
        y = functional.linear(x, self._view(index))
        self._used[index % 2] = main.record_event()
        if index + 1 < len(self._order):
            self._start(index + 1)
        return y

    def _start(self, index: int) -> None:
        """Dequantise into the buffer whose last reader has been asked for before."""
        with torch.cuda.stream(self._side):
            used = self._used[index % 2]
            if used is not None:
                self._side.wait_event(used)
            self._nf4.dequantise(self._order[index], self._view(index))
            self._ready = index, self._side.record_event()

    def _view(self, index: int) -> Tensor:
        n, k = self._order[index].shape
        if not self._buffers:
            largest = max(weight.shape[0] * weight.shape[1] for weight in self._order)
            self._buffers = [torch.empty(largest, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        return self._buffers[index % 2][: n * k].view(n, k)
