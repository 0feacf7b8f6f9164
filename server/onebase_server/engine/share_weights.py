"""The runner's weights, as training processes may use them: one mapped file on a CPU, IPC handles on CUDA.

A description (plain JSON) goes into the server's note (onebase/serving_note.py); the trainer reads it in
onebase_training/shared_base.py. What a backend keeps in a layout of its own is shared in that layout. No requests here.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from onebase.adapter import BaseIdentity
from onebase.shared_tensors import cuda_handles, hold_on_file
from onebase_server.engine.weights import PROJECTIONS, LayerWeights, ModelWeights, Projection
from onebase_server.kernels.cpu_ops import CpuKernels, Repacked
from onebase_server.kernels.cuda_tiles import CODE_SCALE, Tiles

logger = logging.getLogger(__name__)

Place = Callable[[str, Tensor], Tensor]


def share_on_file(
    weights: ModelWeights, kernels: Any, identity: BaseIdentity, cache: Path
) -> tuple[ModelWeights, dict[str, Any]]:
    """What the runner must use from now on, and the description.

    Moves the weights into a file under `cache`, mapped by this process and by every trainer: memory holds them once.

    Where the backend has no layout of its own, or the file can't be written, the weights stay as they are.
    """
    if not isinstance(kernels, CpuKernels):
        return weights, {"device": str(weights.device)}
    layout = "strips-amx" if kernels.amx else "strips"
    tensors = _named(weights)
    known = json.dumps([identity.model_dump(), layout, str(weights.dtype)], sort_keys=True)
    file = cache / f"shared-base-{hashlib.sha256(known.encode()).hexdigest()[:16]}.safetensors"
    try:
        held = hold_on_file(file, tensors)
    except OSError as error:
        logger.warning("training jobs will load a base of their own: %s can't be written (%s)", file, error)
        return weights, {"device": str(weights.device)}
    placed = _placed(weights, lambda name, _: held[name])
    described = _described(weights, identity, layout, _code(weights))
    return placed, {**described, "file": str(file), "library": kernels.library._name}


def describe_cuda(weights: ModelWeights, identity: BaseIdentity) -> dict[str, Any]:
    """Handles of the weights in this process' CUDA memory, where their layout is ours; else the device alone.

    Only for the weights that the runner ended up with: a forward may fold them in place.
    """
    projections = weights.layers[0].projections.values()
    if weights.device.type != "cuda" or not all(isinstance(p.weight.repacked, Tiles) for p in projections):
        return {"device": str(weights.device)}
    tiles = weights.layers[0].projections["gate_up"].weight.repacked
    assert isinstance(tiles, Tiles)
    described = _described(weights, identity, "tiles-folded" if tiles.folded else "tiles", _code(weights))
    return {**described, "code_scale": CODE_SCALE, "handles": cuda_handles(_named(weights))}


def _described(weights: ModelWeights, identity: BaseIdentity, layout: str, code: Tensor) -> dict[str, Any]:
    return {
        "base": identity.model_dump(mode="json"),
        "device": str(weights.device),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "layout": layout,
        "code": code.tolist(),
        "projections": {name: list(modules) for name, modules in PROJECTIONS.items()},
    }


def _code(weights: ModelWeights) -> Tensor:
    return weights.layers[0].projections["qkv"].weight.code.float()


def _named(weights: ModelWeights) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        tensors[name] = tensor
        return tensor

    _placed(weights, note)
    return tensors


def _placed(weights: ModelWeights, place: Place) -> ModelWeights:
    """The weights with every tensor as `place(name, tensor)` gives it. Names are transformers' where it has one."""
    embed = place("model.embed_tokens.weight", weights.embed)
    tied = weights.lm_head.data_ptr() == weights.embed.data_ptr()
    return replace(
        weights,
        embed=embed,
        lm_head=embed if tied else place("lm_head.weight", weights.lm_head),
        norm=place("model.norm.weight", weights.norm),
        layers=[_placed_layer(f"model.layers.{i}", layer, place) for i, layer in enumerate(weights.layers)],
    )


def _placed_layer(prefix: str, layer: LayerWeights, place: Place) -> LayerWeights:
    norms = {
        "input_norm": "input_layernorm",
        "post_norm": "post_attention_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }
    kept: dict[str, Tensor | None] = {
        field: None if (tensor := getattr(layer, field)) is None else place(f"{prefix}.{name}.weight", tensor)
        for field, name in norms.items()
    }
    projections = {name: _placed_projection(f"{prefix}.{name}", p, place) for name, p in layer.projections.items()}
    return replace(layer, **kept, projections=projections)  # type: ignore[arg-type]


def _placed_projection(prefix: str, projection: Projection, place: Place) -> Projection:
    weight, bias = projection.weight, projection.bias
    repacked = weight.repacked
    assert isinstance(repacked, Repacked | Tiles)
    moved = replace(repacked, data=place(f"{prefix}.packed", repacked.data))
    return replace(
        projection,
        weight=replace(weight, repacked=moved),
        bias=None if bias is None else place(f"{prefix}.bias", bias),
    )
