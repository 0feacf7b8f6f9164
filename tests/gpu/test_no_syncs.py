"""The host never waits for the device in a step but for the sampled tokens: torch itself tells of each wait."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gpu_runners import Sequence, make_batch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 5},
    "top_p": {"temperature": 0.8, "top_p": 0.5},
    "penalty": {"temperature": 0.8, "presence_penalty": 1.0},
    "bias": {"logit_bias": {3: 2.0}},
}


@contextmanager
def waits() -> Iterator[list[Any]]:
    """Each operation inside for which torch made the host wait."""
    import torch

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen[:] = [str(one.message) for one in seen if "called a synchronizing" in str(one.message)]


def test_the_tool_tells_of_a_wait() -> None:
    import torch

    with waits() as seen:
        torch.ones(3, device="cuda").sum().item()
    assert seen


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_step_waits_for_its_tokens_only(runners, name: str) -> None:
    ours, _ = runners
    free = list(range(600))
    live = [Sequence(i, [5 + i, 9, 11], -1) for i in range(5)]
    for _ in range(3):  # prefill, then graphs: what is captured, compiled or allocated at first use
        _feed(live, ours.run(make_batch(live, free, **SAMPLINGS[name])))
    live.append(Sequence(5, [1] * 40, -1))
    for _ in range(4):  # decoding and prefill in one step, then decoding alone
        batch = make_batch(live, free, **SAMPLINGS[name])
        with waits() as started:
            ticket = ours.launch(batch)
        assert started == []
        with waits() as collected:
            result = ours.collect(ticket)
        assert len(collected) <= 1, collected
        _feed(live, result)


def _feed(live: list[Sequence], result: Any) -> None:
    for sequence, token in zip(live, result.token_ids.tolist(), strict=True):
        sequence.ids.append(token)
