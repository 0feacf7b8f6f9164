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
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._views: list[Tensor] = []
        self._used, self._ready = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))  # type: ignore[no-untyped-call]
        self._started = -1

    def __call__(self, x: Tensor, weight: NF4Weight) -> Tensor:
        """x [T, K] @ W.T -> [T, N]."""
        index, main = self._index[id(weight)], torch.cuda.current_stream()
        if not self._views:
            self._views = self._make_views()
        if self._started != index:
            self._side.wait_stream(main)
            self._start(index)
        main.wait_event(self._ready[index % 2])
        y = functional.linear(x, self._views[index])
        self._used[index % 2].record(main)
        if index + 1 < len(self._order):
            self._side.wait_event(self._used[(index + 1) % 2])
            self._start(index + 1)
        return y

    def _start(self, index: int) -> None:
        self._nf4.dequantise(self._order[index], self._views[index], stream=self._side.cuda_stream)
        self._ready[index % 2].record(self._side)
        self._started = index

    def _make_views(self) -> list[Tensor]:
        """Two buffers as large as the largest weight; every weight's view of its own one."""
        sizes = [weight.shape for weight in self._order]
        largest = max(n * k for n, k in sizes)
        buffers = [torch.empty(largest, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        return [buffers[i % 2][: n * k].view(n, k) for i, (n, k) in enumerate(sizes)]
