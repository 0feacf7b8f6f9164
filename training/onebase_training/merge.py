"""An adapter added into its base's weights, file by file: W + s B A in fp32 (DoRA: rescaled), rounded once.

Onto the published 16-bit weights, or onto the NF4 values that the adapter was trained and is served on. Memory is
one shard, so a 7B model merges on a laptop. The vocabulary, tokenizer and config stay the base's own.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from onebase.adapter import WEIGHTS, AdapterFiles
from onebase.base_model import load_base
from onebase.bases import BaseSpec, read_base, weight_files
from onebase.errors import AdapterInvalid, Conflict
from onebase_training import lora

Onto = Literal["base", "nf4"]

_COPIED: Final = ("config.json", "generation_config.json", "tokenizer*", "chat_template*", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class Parity:
    """How near the merged model is, on a probe text. KL in nats a token, averaged."""

    max_logit_difference: float
    """Against the adapter on the same unmerged weights."""
    kl_same_base: float
    kl_served: float
    """Against what is served: the adapter on the NF4 base."""


def merge(
    adapter: Path, spec: BaseSpec, dest: Path, *, onto: Onto = "base", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a whole model folder. Raises AdapterInvalid for what can't be merged, Conflict when `dest` exists."""
    if dest.exists():
        raise Conflict(f"{dest} already exists", param="dest")
    merging = Merging(adapter, spec, onto)
    scratch = dest.with_name(f".{dest.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        for shard in weight_files(spec.path):
            merged = {name: weight.to(dtype).contiguous() for name, weight in merging.tensors(shard)}
            save_file(merged, scratch / shard.name, metadata={"format": "pt"})
        _copy_rest(spec, scratch, dtype)
        for shard in weight_files(scratch):  # safetensors writes them for their owner alone
            shutil.copymode(scratch / "config.json", shard)
        scratch.rename(dest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # of what failed or was interrupted
    return dest


class Merging:
    """The base's tensors with the adapter added, one at a time. Raises AdapterInvalid for what can't be merged."""

    def __init__(self, adapter: Path, spec: BaseSpec, onto: Onto) -> None:
        files = AdapterFiles.read(adapter)
        self._config, self._modules = files.config, set(files.modules())
        self._tensors = load_file(adapter / WEIGHTS)
        self._spec, self._onto = spec, onto
        strangers = sorted(self._modules - set(spec.linear_shapes))
        if strangers:
            raise AdapterInvalid(str(adapter), [f"{module} is not in the base" for module in strangers[:5]])

    def tensors(self, shard: Path) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each tensor of one of the base's files; in fp32 where something was added."""
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, self._merged(name.removesuffix(".weight"), file.get_tensor(name))

    def _merged(self, module: str, weight: Tensor) -> Tensor:
        if self._onto == "nf4" and module in self._spec.linear_shapes:
            weight = nf4_values(weight)
        if module not in self._modules:
            return weight
        total = _added(weight, self._tensors, module, self._config.scaling(module))
        if self._config.use_dora:  # arXiv 2402.09353, equation 5: each output's length is learnt apart
            lengths = self._tensors[f"base_model.model.{module}.lora_magnitude_vector"].float()
            total *= (lengths / total.norm(dim=1)).unsqueeze(1)
        if not torch.isfinite(total).all():
            raise AdapterInvalid(module, ["the merged weight is not finite"])
        return total


def nf4_values(weight: Tensor) -> Tensor:
    """What the 4-bit base multiplies by in place of this weight, in fp32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64, compress_statistics=True)
    state.dtype = torch.float32
    values: Tensor = dequantize_4bit(packed, state)
    return values


def parity(adapter: Path, spec: BaseSpec, merged: Path, probe: list[int], *, onto: Onto) -> Parity:
    """Load the three models one after the other, in fp32, and compare their logits on the probe."""
    served = _log_probabilities(spec, adapter, probe, quantize=True)
    same = served if onto == "nf4" else _log_probabilities(spec, adapter, probe, quantize=False)
    ours = _log_probabilities(read_base(merged), None, probe, quantize=False)
    return Parity(
        max_logit_difference=float((ours - same).abs().max()),
        kl_same_base=_divergence(same, ours),
        kl_served=_divergence(served, ours),
    )


def _added(weight: Tensor, tensors: Mapping[str, Tensor], module: str, scaling: float) -> Tensor:
    a = tensors[f"base_model.model.{module}.lora_A.weight"].float()
    b = tensors[f"base_model.model.{module}.lora_B.weight"].float()
    return weight.float() + scaling * (b @ a)


def _copy_rest(spec: BaseSpec, dest: Path, dtype: torch.dtype) -> None:
    for pattern in (*_COPIED, "*.safetensors.index.json"):
        for file in spec.path.glob(pattern):
            shutil.copy2(file, dest / file.name)
    config: dict[str, Any] = json.loads((dest / "config.json").read_text("utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    (dest / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _log_probabilities(spec: BaseSpec, adapter: Path | None, probe: list[int], *, quantize: bool) -> Tensor:
    base = load_base(spec, "cpu", compute_dtype="float32", quantize=quantize)
    with lora.published_adapter(base, adapter) as model, torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([probe])).logits[0].float()
    return logits.log_softmax(-1)


def _divergence(of: Tensor, against: Tensor) -> float:
    return float((of.exp() * (of - against)).sum(-1).mean())
