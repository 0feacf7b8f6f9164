"""Tokens drawn inside the graph: the kernel against the sampler's formula, and the runner against the plain sampler."""

import numpy as np
import pytest

from gpu_runners import Sequence, make_batch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("vocab", [320, 768, 32000, 49152, 151936])
def test_kernel_draws_what_the_formula_draws(kernels, vocab: int) -> None:
    import torch

    rows = 40
    logits = (torch.randn(rows, vocab, device="cuda") * 4).bfloat16()
    logits[3] = 1.0  # all equal
    logits[4, : vocab // 2] = float("-inf")
    temperatures = torch.rand(rows, dtype=torch.float64, device="cuda") * 2 + 0.05
    temperatures[::5] = 0
    uniforms = torch.rand(rows, dtype=torch.float64, device="cuda")
    uniforms[1], uniforms[2] = 2.0**-54, 1 - 2.0**-53
    chosen = torch.full((rows,), -1, dtype=torch.int64, device="cuda")
    kernels.draw_tokens(logits, temperatures, uniforms, chosen)
    wide = logits.double()
    drawn = temperatures > 0
    weights = ((wide - wide.amax(-1, keepdim=True)) / temperatures.clamp(min=1e-3)[:, None]).exp()
    running = weights.cumsum(-1)
    expected = torch.searchsorted(running, uniforms[:, None] * running[:, -1:], right=True)[:, 0].clamp(max=vocab - 1)
    assert (chosen[drawn] != expected[drawn]).sum() <= 1  # sums in another order: a neighbour now and then
    assert torch.equal(logits.gather(1, chosen[:, None])[~drawn, 0], logits.amax(-1)[~drawn])
    assert (weights.gather(1, chosen[:, None]) > 0).all()


def test_a_seeded_draw_is_the_same_in_the_graph_and_in_torch(runners) -> None:
    ours, _ = runners
    rng = np.random.default_rng(4)
    prompts = [[int(t) for t in rng.integers(0, 768, 3 + 4 * i)] for i in range(6)]
    outputs = []
    for in_graph in (True, False):
        ours._draws_in_graph = in_graph
        ours._ahead.forget()
        live, free, rows = [Sequence(i, list(ids), -1) for i, ids in enumerate(prompts)], list(range(200)), []
        for step in range(30):
            batch = make_batch(live, free, temperature=0.7)
            if step:
                batch.rows[:] = rows
            rows = batch.rows
            result = ours.collect(ours.launch(batch))
            for s, row, token in zip(live, rows, result.token_ids.tolist(), strict=True):
                s.ids.append(token)
                row.output_ids.append(token)
        outputs.append([row.output_ids for row in rows])
    ours._draws_in_graph = True
    assert ours._ahead.num_used > 0
    same = sum(a == b for a, b in zip(*outputs, strict=True))
    assert same >= 5  # a draw on the border of two tokens may fall apart
