"""Steps started ahead: greedy runs through `launch` and `collect` give what plain steps give, whatever ends."""

import numpy as np
import pytest

from gpu_runners import Sequence, make_batch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def _generate(runner, batches_of, *, ahead: bool) -> dict[int, list[int]]:
    """Decode with sequences ending at given steps; tokens by state."""
    live, free, outputs = batches_of()
    for step in range(40):
        live = [s for s in live if s.end > step]
        if not live:
            break
        if not ahead:
            runner._ahead.forget()
        result = runner.collect(runner.launch(make_batch(live, free)))
        for s, token in zip(live, result.token_ids.tolist(), strict=True):
            s.ids.append(token)
            outputs[s.state].append(token)
    return outputs


def test_tokens_are_the_same_with_and_without(runners) -> None:
    ours, _ = runners

    def batches_of():
        rng = np.random.default_rng(3)
        live = []
        for i in range(7):
            s = Sequence(i, [int(t) for t in rng.integers(0, 768, 3 + 5 * i)], -1)
            s.end = 40 if i % 3 else 9 + 4 * i
            live.append(s)
        return live, list(range(200)), {i: [] for i in range(7)}

    before = ours._ahead.num_used
    plain = _generate(ours, batches_of, ahead=False)
    assert ours._ahead.num_used == before
    assert _generate(ours, batches_of, ahead=True) == plain
    assert ours._ahead.num_used > before + 8
