"""bitsandbytes' own 4-bit matmul, for GPUs whose shared memory is too small for our kernels. Nothing else is here."""

from importlib.util import find_spec

import torch
from torch import Tensor

from onebase_server.kernels.ops import BLOCK, NF4Weight


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


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None
