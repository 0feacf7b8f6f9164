"""bitsandbytes' own 4-bit matmul: for GPUs whose shared memory is too small for our kernels, and where those can't be
built. It must not know models, layers or LoRA.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from onebase_server.kernels.ops import BLOCK, NF4Weight
from onebase_server.kernels.torch_ops import TorchKernels


class BnbMatmul:
    """`NF4Weight.repacked` of a weight that stays in bitsandbytes' layout, with its absmax un-nested."""

    def __init__(self, weight: NF4Weight) -> None:
        from bitsandbytes.functional import QuantState

        n, k = weight.shape
        self._packed = weight.packed.reshape(n * k // 2, 1)
        self._state = QuantState(
            absmax=weight.absmax.flatten(),
            shape=torch.Size((n, k)),
            code=weight.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] bf16 -> [T, N]."""
        from bitsandbytes import matmul_4bit

        out: Tensor = matmul_4bit(x, self._packed.t(), self._state)
        return out


class BnbKernels(TorchKernels):
    """Implements `Kernels` on any GPU that bitsandbytes runs on, without a compiler: its matmul, torch for the rest."""

    def prepare(self, weight: NF4Weight) -> NF4Weight:
        return replace(weight, repacked=BnbMatmul(weight))

    def nf4_matmul(self, x: Tensor, weight: NF4Weight) -> Tensor:
        if isinstance(weight.repacked, BnbMatmul) and x.dtype == torch.bfloat16:
            return weight.repacked(x)
        return super().nf4_matmul(x, weight)


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None
