"""SmolLM2's real weights: greedy tokens and logits against transformers + PEFT, base and adapters mixed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from real_process import prepare_home
from step_driver import Driver, Sequence

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "qkv": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all-linear": {"r": 16, "lora_alpha": 16, "target_modules": ALL_LINEAR, "use_rslora": True},
}
QUESTIONS = ["The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n"]
COUNT = 16


@dataclass
class Real:
    """The same NF4 weights on both sides, computed in fp32."""

    runner: Any
    prompts: list[list[int]]
    tokens: list[list[int]]
    """Greedy continuation of each prompt alone, by `generate`."""
    logits: list[Any]
    """[T, V] of prompt and continuation, by transformers + PEFT."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    import torch

    from onebase.base_model import load_base
    from onebase.bases import resolve_base
    from onebase_server.engine.runner_torch import RunnerConfig, build_runner
    from onebase_server.engine.types import AdapterRef
    from onebase_server.kernels.cpu_build import load_library
    from onebase_server.kernels.cpu_ops import CpuKernels
    from onebase_server.kernels.torch_ops import TorchKernels
    from tiny_models import peft_adapter

    root = tmp_path_factory.mktemp("real")
    home = prepare_home(root / "home")
    base = load_base(resolve_base(home, "SmolLM2-135M-Instruct"), "cpu", compute_dtype="float32")
    prompts = [base.tokenizer.encode(text, first=True) for text in QUESTIONS]
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        peft_adapter(base.model, root / "adapters", name, seed=seed, **config)
    folders: list[Path | None] = [None, *(root / "adapters" / name for name in ADAPTERS)]
    alone = [_alone(base.model, folder, p) for folder, p in zip(folders, prompts, strict=True)]
    library = load_library(home.cache)
    kernels = TorchKernels() if library is None else CpuKernels(library, torch.float32)
    runner = build_runner(base, kernels, RunnerConfig(num_pages=64, num_slots=2, max_lora_rank=16))
    for slot, name in enumerate(ADAPTERS):
        runner.load_slot(slot, runner.read_adapter(AdapterRef(name, 1, name, root / "adapters" / name)))
    return Real(runner, prompts, [tokens for tokens, _ in alone], [logits for _, logits in alone])


def _alone(base: Any, folder: Path | None, prompt: list[int]) -> tuple[list[int], Any]:
    import peft
    import torch

    model = base if folder is None else peft.PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": COUNT, "min_new_tokens": COUNT, "eos_token_id": []}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    with torch.inference_mode():
        logits = model(input_ids=out).logits[0].float()
    if folder is not None:
        model.unload()
    return out[0, len(prompt) :].tolist(), logits


def test_greedy_tokens_of_a_mixed_batch_are_those_of_each_alone(real: Real) -> None:
    driver = Driver(real.runner)
    sequences = [driver.add(Sequence(prompt, slot=i - 1)) for i, prompt in enumerate(real.prompts)]
    assert driver.generate(sequences, COUNT, chunk=5) == real.tokens
    others = [driver.add(Sequence(real.prompts[0], slot=slot)) for slot in (-1, 0, 1)]
    assert len({tuple(found) for found in driver.generate(others, COUNT)}) == 3, "the adapters must matter"


def test_logits_are_those_of_transformers_and_peft(real: Real) -> None:
    for i, (prompt, tokens) in enumerate(zip(real.prompts, real.tokens, strict=True)):
        driver = Driver(real.runner)
        found = driver.logits(driver.add(Sequence([*prompt, *tokens], slot=i - 1)))
        expected = real.logits[i]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 2e-4 * expected.std(), i
