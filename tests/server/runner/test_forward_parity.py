"""The lean forward against transformers + PEFT on the same NF4 weights: every architecture, adapter shape and mix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase_server.engine.runner_torch import TorchRunner
from onebase_server.engine.types import AdapterRef
from step_driver import Driver, Sequence
from tiny_models import CONFIGS, peft_adapter, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]  # PEFT's use of transformers

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "qkv": {"r": 8},
    "all-rslora": {"r": 4, "lora_alpha": 4, "target_modules": ALL_LINEAR, "use_rslora": True},
    "patterns": {
        "r": 6,
        "target_modules": ["q_proj", "down_proj", "up_proj"],
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 12},
        "alpha_pattern": {"down_proj": 2},
    },
}
PROMPTS = [[1, *range(40, 40 + n)] for n in (5, 37, 18, 70)]


def ref(path: Path) -> AdapterRef:
    return AdapterRef(path.name, 1, path.name, path)


def folders(models: Path, name: str) -> list[Path]:
    """PEFT's own folders of ADAPTERS for a tiny model, written once."""
    where = models / f"adapters-{name}"
    if not where.exists():
        model = tiny_model(models, name)
        for seed, (adapter, config) in enumerate(ADAPTERS.items()):
            peft_adapter(model, where, adapter, seed=seed, **config)
    return [where / adapter for adapter in ADAPTERS]


def load_all(runner: TorchRunner, paths: list[Path]) -> None:
    for slot, path in enumerate(paths):
        runner.load_slot(slot, runner.read_adapter(ref(path)))
        assert runner.slot_ready(slot)


def reference(models: Path, name: str, paths: list[Path], count: int) -> list[list[int]]:
    """Greedy tokens of each prompt alone: the base, then each adapter, by `generate`."""
    import peft

    base = tiny_model(models, name)
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "eos_token_id": []}
    found = []
    for path, prompt in zip([None, *paths], PROMPTS, strict=True):
        model = base if path is None else peft.PeftModel.from_pretrained(base, path).eval()
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        found.append(out[0, len(prompt) :].tolist())
        if path is not None:
            base = model.unload()
    return found


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_tokens_of_a_mixed_batch_equal_transformers_and_peft_alone(
    name: str, models: Path, make_runner: Callable[..., TorchRunner]
) -> None:
    paths = folders(models, name)
    expected = reference(models, name, paths, 12)
    assert len({tuple(tokens) for tokens in expected}) >= 3  # adapters matter
    for backend, chunk in (("torch", 16), ("native", 16), ("native", 5)):
        runner = make_runner(name, backend)
        load_all(runner, paths)
        driver = Driver(runner)
        sequences = [driver.add(Sequence(prompt, slot=i - 1)) for i, prompt in enumerate(PROMPTS)]
        assert driver.generate(sequences, 12, chunk) == expected, (backend, chunk)


@pytest.mark.parametrize("backend", ["native", "x86-64-v3", "x86-64"])
def test_every_compiler_target_agrees_with_the_torch_twin(
    backend: str, models: Path, make_runner: Callable[..., TorchRunner]
) -> None:
    paths = folders(models, "qwen3")
    twin, own = make_runner("qwen3", "torch"), make_runner("qwen3", backend)
    for runner in (twin, own):
        load_all(runner, paths)
    for slot in (-1, 0, 1, 2):
        expected, found = (Driver(r).logits(d(PROMPTS[3], slot, r)) for r in (twin, own) for d in (_sequence,))
        assert torch.allclose(expected, found, atol=2e-5, rtol=0), (slot, (expected - found).abs().max())


@pytest.mark.parametrize("backend", ["native", "x86-64-v3"])
def test_bf16_logits_stay_within_bf16_noise_of_the_exact_ones(
    backend: str, models: Path, make_runner: Callable[..., TorchRunner]
) -> None:
    """The yardstick is the twin in bf16, which rounds where transformers does: we may not be noisier than it."""
    paths = folders(models, "llama")
    runners = [make_runner("llama", *which) for which in (("torch", torch.bfloat16), (backend, torch.bfloat16))]
    exact = make_runner("llama", "torch", torch.float32)
    with torch.no_grad():  # the same NF4 values: quantised from weights rounded to bf16
        for target, source in zip(exact.weights.layers, runners[0].weights.layers, strict=True):
            target.projections.update(source.projections)
        exact.weights.embed.copy_(runners[0].weights.embed)
    for runner in (*runners, exact):
        load_all(runner, paths)
    for slot in (-1, 1):
        truth = Driver(exact).logits(_sequence(PROMPTS[3], slot, exact))
        noise, own = ((Driver(r).logits(_sequence(PROMPTS[3], slot, r)) - truth).std() for r in runners)
        assert own < 1.2 * noise < 0.1 * truth.std()


def _sequence(prompt: list[int], slot: int, runner: TorchRunner) -> Sequence:
    return Driver(runner).add(Sequence(prompt, slot=slot))
