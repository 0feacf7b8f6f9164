"""A version's files -> one adapter in host memory in the layout of the pools, scaling folded in, checked.

`A` of a fused projection is [layers, I, r, K] and `B` is [layers, r, N]: what a module lacks is zero. `r` is the
adapter's largest rank; smaller modules fill their first rows. Nothing here touches the device or the slots.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from onebase.adapter import WEIGHTS, AdapterFiles, BaseIdentity, validate_adapter
from onebase.errors import AdapterInvalid
from onebase_server.engine.weights import PROJECTIONS, ModelWeights

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."
_INFINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Bits of an infinity by compute dtype."""


@dataclass(frozen=True, slots=True)
class TorchHostAdapter:
    """Implements `HostAdapter`."""

    rank: int
    a: dict[str, Tensor]  # projection -> [layers, I, rank, K]; an expanded zero where no module is targeted
    b: dict[str, Tensor]  # projection -> [layers, rank, N], scaling folded in
    module_ranks: dict[str, tuple[int, ...]]  # projection -> one rank a module, 0 where not targeted

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self.a.values(), *self.b.values()))


def read_host_adapter(
    path: Path, weights: ModelWeights, identity: BaseIdentity | None, max_rank: int
) -> TorchHostAdapter:
    """Read, validate and lay out. Raises AdapterInvalid with every problem found."""
    files = AdapterFiles.read(path)
    validate_adapter(files, _module_shapes(weights), identity)
    tensors = _read_tensors(path)
    rank = max(t.shape[0] for name, t in tensors.items() if _A in name)
    problems = [f"rank {rank} is above the server's limit of {max_rank} (max_lora_rank)"] if rank > max_rank else []
    host = lay_out(tensors, files.config.scaling, weights, rank) if not problems else None
    if host is None or not _is_finite(host):
        problems += [
            f"{name} holds values that are not finite" for name, t in tensors.items() if not t.isfinite().all()
        ]
    if host is None or problems:
        raise AdapterInvalid(str(path), problems)
    return host


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
        paths = [(layer, i, f"model.layers.{layer}.{m}") for layer in range(layers) for i, m in enumerate(modules)]
        present = [(layer, i, path) for layer, i, path in paths if path in pairs]
        own = [0] * len(modules)
        for _, i, path in present:
            own[i] = max(own[i], tensors[pairs[path]].shape[0])
        ranks[projection] = tuple(own)
        shapes = (layers, len(modules), rank, k), (layers, rank, n)
        if not present:  # slots clear these rows themselves: no memory for zeros
            a[projection], b[projection] = (torch.zeros((), dtype=dtype).expand(shape) for shape in shapes)
            continue
        is_full = len(present) == len(paths) and all(tensors[pairs[path]].shape[0] == rank for _, _, path in present)
        make = torch.empty if is_full else torch.zeros
        down, up = a[projection], b[projection] = [make(shape, dtype=dtype, pin_memory=pin) for shape in shapes]
        for layer, i, path in present:
            source = tensors[pairs[path]]
            r = source.shape[0]
            down[layer, i, :r] = source
            whole = tensors[pairs[path].replace(_A, _B)].float()  # the product is fp32, rounded once on its way out
            torch.mul(whole.T, scaling(path), out=up[layer, :r, offsets[i] : offsets[i + 1]])
    return TorchHostAdapter(rank=rank, a=a, b=b, module_ranks=ranks)


def _is_finite(host: TorchHostAdapter) -> bool:
    """By the largest magnitude as bits, which NaN and infinity exceed. In numpy: torch's threads are the engine's."""
    used = [name for name, ranks in host.module_ranks.items() if any(ranks)]
    return all(_largest_bits(side[name]) < _INFINITE[side[name].dtype] for name in used for side in (host.a, host.b))


def _largest_bits(tensor: Tensor) -> int:
    bits = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy()
    return int((bits & np.iinfo(bits.dtype).max).max())


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
