"""LoftQ's start in the form that leaves the base alone (arXiv 2310.08659): B A begins as a best low-rank
approximation of what NF4 rounded away, instead of zero. The adapter stays a plain LoRA.
"""

from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from onebase.base_model import LoadedBase, dequantized, linear4bit_modules
from onebase.bases import weight_files
from onebase.errors import RecipeError

_EXTRA: Final = 8
_BLOCKS: Final = 12
"""Of the Krylov space: on a 4096 x 4096 matrix of noise, the hardest there is, rank 16 then holds 99 % of what the
full decomposition would, in a thirtieth of the time (bench/loftq.py)."""


def start_from_rounding_error(model: Any, base: LoadedBase) -> int:
    """Set the adapter's weights layer by layer from the base's own 16-bit files; how many layers were set.

    One tensor is in memory at a time. Raises RecipeError when the files lack one of the adapted layers.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)
    }
    quantised = {id(module): module for module in linear4bit_modules(base.model).values()}
    waiting = {name: layer for name, layer in adapted.items() if id(layer.base_layer) in quantised}
    count = len(waiting)
    for shard in weight_files(base.spec.path):
        with safe_open(shard, "pt") as file:
            for name in sorted(file.keys()):
                layer = waiting.pop(name.removesuffix(".weight"), None) if name.endswith(".weight") else None
                if layer is not None:
                    _set(layer, file.get_tensor(name))
    if waiting:
        raise RecipeError(
            f"lora.init: loftq needs the base's 16-bit weights, and its files lack {sorted(waiting)[0]}; "
            "use default, or fetch the base again",
            param="lora.init",
        )
    return count


def _set(layer: Any, original: Tensor) -> None:
    rounded = dequantized(layer.base_layer, torch.float32)
    a, b = best_low_rank(original.to(rounded.device, torch.float32) - rounded, layer.r["default"])
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b / layer.scaling["default"])
        if "default" in layer.lora_magnitude_vector:  # DoRA: as long as the rows that it now starts from
            layer.lora_magnitude_vector["default"].weight.copy_(torch.linalg.norm(rounded + b @ a, dim=1))


def best_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product is nearest to `matrix` [out, in] (Eckart and Young), balanced.

    Small matrices exactly; of large ones the leading directions are found in a block Krylov space (Musco and Musco,
    arXiv 1504.05477) from a fixed start, so that every run begins the same.
    """
    width = rank + _EXTRA
    if 2 * width * _BLOCKS >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:rank].sqrt()
        return root[:, None] * v[:rank], u[:, :rank] * root
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix)
    block, blocks = torch.linalg.qr(matrix @ start).Q, []
    for _ in range(_BLOCKS - 1):
        blocks.append(block)
        block = torch.linalg.qr(matrix @ (matrix.T @ block)).Q
    space = torch.linalg.qr(torch.cat([*blocks, block], 1)).Q
    inside = space.T @ matrix
    squares, directions = torch.linalg.eigh(inside @ inside.T)
    leading = directions[:, -rank:]
    root = squares[-rank:].clamp_min(1e-30).pow(0.25)[:, None]
    return leading.T @ inside / root, space @ leading * root.T
