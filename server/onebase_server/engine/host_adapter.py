"""A version's files -> one adapter in host memory in the layout of the pools, scaling folded in, checked.

`A` of a fused projection is [layers, I, r, K] and `B` is [layers, r, N]: what a module lacks is zero. `r` is the
adapter's largest rank; smaller modules fill their first rows. Nothing here touches the device or the slots.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from onebase.adapter import WEIGHTS, AdapterFiles, BaseIdentity, validate_adapter
from onebase.errors import AdapterInvalid
from onebase_server.engine.weights import PROJECTIONS, ModelWeights

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class TorchHostAdapter:
    """Implements `HostAdapter`."""

    rank: int
    a: dict[str, Tensor]  # projection -> [layers, I, rank, K]
    b: dict[str, Tensor]  # projection -> [layers, rank, N], scaling folded in
    module_ranks: dict[str, tuple[int, ...]]  # projection -> one rank a module, 0 where not targeted

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.a.values(), *self.b.values()))


def read_host_adapter(
    path: Path, weights: ModelWeights, identity: BaseIdentity | None, max_rank: int
) -> TorchHostAdapter:
    """Read, validate and lay out. Raises AdapterInvalid with every problem found."""
    files = AdapterFiles.read(path)
    validate_adapter(files, _module_shapes(weights), identity)
    tensors = _read_tensors(path)
    problems = [f"{name} holds values that are not finite" for name, t in tensors.items() if not t.isfinite().all()]
    rank = max(t.shape[0] for name, t in tensors.items() if _A in name)
    if rank > max_rank:
        problems.append(f"rank {rank} is above the server's limit of {max_rank} (max_lora_rank)")
    if problems:
        raise AdapterInvalid(str(path), problems)
    return lay_out(tensors, files.config.scaling, weights, rank)


def lay_out(
    tensors: Mapping[str, Tensor], scaling: Callable[[str], float], weights: ModelWeights, rank: int
) -> TorchHostAdapter:
    """PEFT's tensors by name -> pools' layout in the compute dtype; `scaling(module path)` is folded into B in fp32."""
    pairs = {_module_of(name): name for name in tensors if _A in name}
    first, layers, dtype = weights.layers[0].projections, weights.geometry.layers, weights.dtype
    pin = weights.device.type == "cuda"
    a, b, ranks = {}, {}, {}
    for projection, modules in PROJECTIONS.items():
        n, k = first[projection].weight.shape
        offsets = first[projection].offsets
        a[projection] = torch.zeros(layers, len(modules), rank, k, dtype=dtype, pin_memory=pin)
        b[projection] = torch.zeros(layers, rank, n, dtype=dtype, pin_memory=pin)
        own = [0] * len(modules)
        for layer in range(layers):
            for i, module in enumerate(modules):
                path = f"model.layers.{layer}.{module}"
                if path not in pairs:
                    continue
                down = tensors[pairs[path]].float()
                up = tensors[pairs[path].replace(_A, _B)].float() * scaling(path)
                r = down.shape[0]
                own[i] = max(own[i], r)
                a[projection][layer, i, :r] = down
                b[projection][layer, :r, offsets[i] : offsets[i + 1]] = up.T
        ranks[projection] = tuple(own)
    return TorchHostAdapter(rank=rank, a=a, b=b, module_ranks=ranks)


def _module_of(tensor_name: str) -> str:
    return tensor_name.removeprefix(_PREFIX).removesuffix(_A)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _module_shapes(weights: ModelWeights) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of every linear that a LoRA may target."""
    shapes = {}
    for index, layer in enumerate(weights.layers):
        for name, modules in PROJECTIONS.items():
            projection = layer.projections[name]
            borders = zip(projection.offsets, projection.offsets[1:], strict=False)
            for module, (low, high) in zip(modules, borders, strict=True):
                shapes[f"model.layers.{index}.{module}"] = (high - low, projection.weight.shape[1])
    return shapes
