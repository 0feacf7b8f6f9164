"""SmolLM2's first layers on this GPU against fp32 on a CPU: logits and greedy tokens, with graphs and without.

`make FILE --base FOLDER` (any machine with bitsandbytes): quantises, cuts to `LAYERS` layers and `VOCAB` tokens so that
the file is small, and runs the twin kernels in fp32 and bf16. `check FILE`: the CUDA runner fed the same tokens.
PYTHONPATH=core:server:tests.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_runners import Sequence, make_batch
from onebase.base_model import load_base
from onebase.bases import read_base
from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner
from onebase_server.engine.weights import Geometry, LayerWeights, ModelWeights, Projection, read_weights
from onebase_server.kernels.ops import NF4Weight
from onebase_server.kernels.torch_ops import TorchKernels, dequantize

LAYERS, VOCAB, STEPS, PAGES = 12, 8192, 20, 200
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small boat that",
    "Water boils at",
    "In the year 1969, men first walked on the",
    "def add(a, b):\n    return",
    "My favourite colour is",
)
CONFIG = RunnerConfig(num_pages=PAGES, num_slots=1, max_lora_rank=8, max_batch_sequences=8)


class DenseKernels(TorchKernels):
    """Dequantises each weight once."""

    def __init__(self) -> None:
        self._dense: dict[int, torch.Tensor] = {}

    def nf4_matmul(self, x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
        if id(weight) not in self._dense:
            self._dense[id(weight)] = dequantize(weight, x.dtype)
        return torch.nn.functional.linear(x, self._dense[id(weight)])


def make(file: Path, folder: Path) -> None:
    base = load_base(read_base(folder), torch.device("cpu"))
    whole = read_weights(base.model, TorchKernels(), 512)
    embed = whole.embed[:VOCAB].clone()
    geometry = replace(whole.geometry, layers=LAYERS, vocab=VOCAB)
    weights = replace(whole, geometry=geometry, layers=whole.layers[:LAYERS], embed=embed, lm_head=embed)
    prompts = [[i for i in base.tokenizer.encode(text, first=True) if i < VOCAB] for text in TEXTS]
    with torch.inference_mode():
        exact, tokens = follow(in_fp32(weights), prompts, None)
        rounded, chosen = follow(weights, prompts, tokens)
    error = exact - rounded
    saved = {
        "geometry": tuple(getattr(geometry, name) for name in Geometry.__slots__),
        "weights": {name: getattr(weights, name).clone() for name in ("embed", "norm", "cos", "sin")},
        "layers": [layer_dict(layer) for layer in weights.layers],
        "prompts": prompts,
        "tokens": tokens,
        "exact": exact.half(),
        "cpu": {
            "cpu_bf16_rms": error.pow(2).mean().sqrt().item(),
            "cpu_bf16_largest": error.abs().max().item(),
            "cpu_bf16_tokens_equal": float((np.array(tokens) == np.array(chosen)).mean()),
        },
    }
    torch.save(saved, file)


def follow(weights: ModelWeights, prompts: list[list[int]], forced: list[list[int]] | None) -> tuple[Any, Any]:
    """Logits [steps, prompts, V] and greedy tokens, fed `forced` where given, else its own tokens."""
    runner = TorchRunner(weights, DenseKernels(), CONFIG, eos_token_ids=frozenset())
    live, free = [Sequence(i, list(ids), -1) for i, ids in enumerate(prompts)], list(range(PAGES))
    logits, tokens = [], []
    for step in range(STEPS):
        logits.append(eager(runner, make_batch(live, free)).float())
        tokens.append(logits[-1].argmax(-1).tolist())
        feed(live, forced[step] if forced else tokens[-1])
    return torch.stack(logits), tokens


def eager(runner: TorchRunner, batch: Any) -> torch.Tensor:
    meta, active = runner.step_meta(batch)
    last = (batch.query_starts[1:] - 1).astype(np.int64)
    with torch.inference_mode():
        return runner.forward(runner._put(batch.token_ids), meta, active, runner._put(last))


def feed(live: list[Sequence], tokens: list[int]) -> None:
    for sequence, token in zip(live, tokens, strict=True):
        sequence.ids.append(int(token))


def in_fp32(weights: ModelWeights) -> ModelWeights:
    layers = [
        replace(layer, input_norm=layer.input_norm.float(), post_norm=layer.post_norm.float())
        for layer in weights.layers
    ]
    embed = weights.embed.float()
    return replace(weights, embed=embed, lm_head=embed, norm=weights.norm.float(), layers=layers)


def layer_dict(layer: LayerWeights) -> dict[str, Any]:
    def weight(p: Projection) -> dict[str, Any]:
        w = p.weight
        return {"packed": w.packed.clone(), "absmax": w.absmax.clone(), "shape": w.shape, "code": w.code}

    return {
        "input_norm": layer.input_norm,
        "post_norm": layer.post_norm,
        "projections": {name: (weight(p), p.offsets) for name, p in layer.projections.items()},
    }


def on_cuda(saved: dict[str, Any], kernels: Any) -> ModelWeights:
    def projection(w: dict[str, Any], offsets: tuple[int, ...]) -> Projection:
        nf4 = NF4Weight(w["packed"].cuda(), w["absmax"].cuda(), tuple(w["shape"]), w["code"].cuda())
        return Projection(kernels.prepare(nf4), None, tuple(offsets))

    layers = [
        LayerWeights(
            layer["input_norm"].cuda(),
            layer["post_norm"].cuda(),
            None,
            None,
            {name: projection(*parts) for name, parts in layer["projections"].items()},
        )
        for layer in saved["layers"]
    ]
    embed, norm, cos, sin = (saved["weights"][name].cuda() for name in ("embed", "norm", "cos", "sin"))
    return ModelWeights(Geometry(*saved["geometry"]), embed, layers, norm, embed, cos, sin)


def check(file: Path) -> None:
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.kernels.cuda_ops import CudaKernels

    saved = torch.load(file, weights_only=True)
    kernels = CudaKernels()
    runner = CudaRunner(on_cuda(saved, kernels), kernels, CONFIG, eos_token_ids=frozenset())
    exact, expected = saved["exact"].float(), np.array(saved["tokens"])
    seen = []
    for graphs in (False, True):
        live, free = [Sequence(i, list(p), -1) for i, p in enumerate(saved["prompts"])], list(range(PAGES))
        logits, tokens = [], []
        for step, wanted in enumerate(saved["tokens"]):
            batch = make_batch(live, free)
            if graphs and step:
                runner._ahead.forget()  # nothing is started ahead, so that the logits are this step's
                tokens.append(runner.run(batch).token_ids.tolist())
                logits.append(runner._graphs.logits[: len(live)].float().cpu())
            else:
                logits.append(eager(runner, batch).float().cpu())
                tokens.append(logits[-1].argmax(-1).tolist())
            feed(live, wanted)
        seen.append(torch.stack(logits))
        error, chosen = seen[-1] - exact, np.array(tokens)
        apart = [float(exact[s, i].max() - exact[s, i, chosen[s, i]]) for s, i in np.argwhere(chosen != expected)]
        line = {
            "gpu": torch.cuda.get_device_name(),
            "what": f"SmolLM2's first {LAYERS} layers, teacher-forced, against fp32 on the CPU",
            "graphs": graphs,
            "steps": STEPS,
            "sequences": len(saved["prompts"]),
            "tokens_equal": round(float((chosen == expected).mean()), 4),
            "parted_by": [round(gap, 3) for gap in apart],
            "rms": round(error.pow(2).mean().sqrt().item(), 4),
            "largest": round(error.abs().max().item(), 3),
            **{name: round(value, 4) for name, value in saved["cpu"].items()},
        }
        print(json.dumps(line), flush=True)
    print(json.dumps({"what": "graph against eager", "largest": (seen[1] - seen[0]).abs().max().item()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", type=Path, help="for make: the folder of SmolLM2-135M-Instruct")
    options = parser.parse_args()
    if options.what == "make":
        make(options.file, options.base)
    else:
        check(options.file)
