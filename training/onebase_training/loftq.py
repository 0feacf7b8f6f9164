"""LoftQ's start in the form that leaves the base alone (arXiv 2310.08659): B A begins as the best low-rank
approximation of what NF4 rounded away, instead of zero. The adapter stays a plain LoRA.
"""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from onebase.base_model import LoadedBase, dequantized, linear4bit_modules
from onebase.bases import weight_files


def start_from_rounding_error(model: Any, base: LoadedBase) -> int:
    """Set the adapter's weights layer by layer from the base's own 16-bit files; how many layers were set."""
    from peft.tuners.lora import LoraLayer

    adapted = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)
    }
    quantised = {id(module): module for module in linear4bit_modules(base.model).values()}
    done = 0
    for shard in weight_files(base.spec.path):
        for name, weight in load_file(shard).items():
            layer = adapted.get(name.removesuffix(".weight"))
            if layer is None or id(layer.base_layer) not in quantised:
                continue
            lost = weight.float() - dequantized(layer.base_layer, torch.float32).cpu()
            a, b = best_low_rank(lost, layer.r["default"])
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b / layer.scaling["default"])
            done += 1
    return done


def best_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product is nearest to `matrix` [out, in] (Eckart and Young), balanced."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
