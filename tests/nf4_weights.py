"""Random NF4 weights and their exact values, for tests of kernels."""

from typing import TYPE_CHECKING

from onebase_server.kernels.ops import BLOCK, NF4Weight

if TYPE_CHECKING:
    import torch

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def random_weight(n: int, k: int, device: str = "cuda") -> NF4Weight:
    import torch

    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(n, k // BLOCK, device=device) * 0.09 + 0.01
    return NF4Weight(packed, absmax, (n, k), torch.tensor(CODEBOOK, device=device))


def exact(weight: NF4Weight) -> "torch.Tensor":
    """fp64 [N, K]."""
    import torch

    n, k = weight.shape
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), -1).view(n, k // BLOCK, BLOCK)
    return (weight.code.double()[codes.int()] * weight.absmax.double()[:, :, None]).view(n, k)


def relative_error(out: "torch.Tensor", reference: "torch.Tensor") -> float:
    """‖out - ref‖ / ‖ref‖; NaN counts as infinite."""
    error = ((out.double() - reference).norm() / reference.norm()).item()
    return float(error) if error == error else float("inf")
