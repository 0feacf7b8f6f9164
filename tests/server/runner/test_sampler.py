"""The sampler against exact distributions, and vLLM's and OpenAI's meaning of every parameter."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onebase_server.engine.cpu_choose import cpu_chooser
from onebase_server.engine.runner import SampleRow, StepResult
from onebase_server.engine.sampler import Chooser, Sampler, uniforms
from onebase_server.engine.types import SamplingParams
from onebase_server.kernels.cpu_build import load_library
from onebase_server.kernels.cpu_ops import CpuKernels

pytestmark = pytest.mark.slow

VOCAB = 64
DRAWS = 20000


@pytest.fixture(params=["torch", "native", "x86-64-v3"], autouse=True)
def backend(request: pytest.FixtureRequest, kernel_cache: Path) -> Iterator[None]:
    """Every test runs with the draw in torch and with the one in C++."""
    global CHOOSE
    CHOOSE = None
    if request.param != "torch":
        library = load_library(kernel_cache, march=request.param)
        if library is None:
            pytest.skip("no C++ compiler here")
        CHOOSE = cpu_chooser(CpuKernels(library, torch.float32))
    yield
    CHOOSE = None


CHOOSE: Chooser | None = None


def sampler(vocab: int = VOCAB, eos: frozenset[int] = frozenset({2})) -> Sampler:
    return Sampler(vocab, torch.device("cpu"), eos, CHOOSE)


def row(
    state: int = 0, seed: int = 1, output: list[int] | None = None, prompt: tuple[int, ...] = (), **params: Any
) -> SampleRow:
    return SampleRow(state, SamplingParams(max_tokens=99, **params), seed, prompt, list(output or []))


def draw(logits: torch.Tensor, rows: list[SampleRow]) -> StepResult:
    return sampler(logits.shape[-1]).sample(logits.clone(), rows)


def frequencies(logits: torch.Tensor, **params: Any) -> np.ndarray[Any, Any]:
    """Shares of DRAWS draws with different seeds from one row of logits."""
    counts = np.zeros(len(logits))
    for first in range(0, DRAWS, 1000):
        rows = [row(seed=first + i, **params) for i in range(1000)]
        counts += np.bincount(draw(logits.repeat(1000, 1), rows).token_ids, minlength=len(logits))
    return counts / DRAWS


def logits_of(seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def close(found: np.ndarray[Any, Any], expected: torch.Tensor) -> bool:
    """Within five standard deviations of a binomial in every cell, and never a banned token."""
    p = expected.double().numpy()
    return bool((np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-12).all())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_plain_draws_follow_the_softmax_at_every_temperature(temperature: float) -> None:
    logits = logits_of()
    assert close(frequencies(logits, temperature=temperature), (logits / temperature).softmax(-1))


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = logits_of(1)
    p, order = logits.softmax(-1).sort(descending=True)
    kept = (p.cumsum(-1) - p) < 0.7
    expected = torch.zeros(VOCAB).scatter(0, order, torch.where(kept, p, 0.0))
    assert close(frequencies(logits, top_p=0.7), expected / expected.sum())


def test_min_p_then_top_k_then_top_p_of_what_is_left() -> None:
    logits = logits_of(2)
    p, order = (logits / 0.9).softmax(-1).sort(descending=True)
    p = torch.where((p >= 0.02 * p[0]) & (torch.arange(VOCAB) < 12), p, 0.0)
    p = p / p.sum()
    p = torch.where(p.cumsum(-1) - p < 0.85, p, 0.0)
    expected = torch.zeros(VOCAB).scatter(0, order, p / p.sum())
    assert close(frequencies(logits, temperature=0.9, min_p=0.02, top_k=12, top_p=0.85), expected)


def test_a_top_p_that_reaches_past_the_first_candidates_is_exact() -> None:
    """A flat vocabulary of 5,000: the kept set is longer than the sorted prefix that is looked at first."""
    logits = torch.linspace(0.1, 0.0, 5000)
    rows = [row(seed=i, top_p=0.9) for i in range(3000)]
    tokens = draw(logits.repeat(3000, 1), rows).token_ids
    p = logits.softmax(-1)
    last = int((p.cumsum(-1) - p < 0.9).sum()) - 1
    assert tokens.max() <= last
    assert (tokens > 1024).mean() == pytest.approx(1 - float(p[:1025].sum()) / float(p[: last + 1].sum()), abs=0.05)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"temperature": 1e-7}])
def test_each_way_of_saying_greedy_is_argmax(params: dict[str, Any]) -> None:
    logits = torch.randn(5, VOCAB)
    found = draw(logits, [row(seed=i, **params) for i in range(5)]).token_ids
    assert found.tolist() == logits.argmax(-1).tolist()


def test_a_rows_token_depends_on_its_own_seed_and_step_only() -> None:
    logits = logits_of(3)
    alone = draw(logits[None], [row(seed=77, output=[4, 4, 9])]).token_ids[0]
    neighbours = [
        row(1, seed=5, top_p=0.5),
        row(2, temperature=0.0),
        row(3, seed=77, output=[1, 2, 3]),
        row(4, seed=6, min_p=0.3, repetition_penalty=1.4, prompt=(3, 4)),
    ]
    crowd = draw(torch.stack([logits_of(9), logits_of(8), logits, logits_of(7)]), neighbours).token_ids
    assert crowd[2] == alone


def test_uniforms_are_uniform_over_seeds_and_over_steps_and_do_not_repeat() -> None:
    for rows in ([row(seed=s) for s in range(4096)], [row(seed=9, output=[0] * n) for n in range(4096)]):
        u = uniforms(rows)
        counts = np.histogram(u, bins=16, range=(0, 1))[0]
        assert ((counts - 256) ** 2 / 256).sum() < 45  # chi squared, 15 degrees of freedom: p about 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.06
        assert len(set(u.tolist())) == 4096
    assert uniforms([row(seed=-1)]) == uniforms([row(seed=2**64 - 1)])


def test_penalties_are_vllms() -> None:
    """Repetition counts prompt and answer, divides positive and multiplies negative logits; the others the answer."""
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.5, 1.0, 4.0]])
    penalised = row(
        prompt=(0, 1), output=[3, 3, 5], temperature=0.0,
        repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5,
    )  # fmt: skip
    expected = torch.tensor([1.0, -2.0, 3.0, 0.25 - 0.5 - 0.5, 1.0, 2.0 - 0.25 - 0.5])
    edited = logits.clone()
    subject = sampler(6, frozenset())
    assert subject.sample(edited, [penalised]).token_ids[0] == 2
    assert torch.allclose(edited[0], expected)


def test_counts_follow_the_answer_and_end_with_the_sequence() -> None:
    subject = sampler(4, frozenset())
    own = row(temperature=0.0, frequency_penalty=1.0)
    for _ in range(6):
        own.output_ids.append(int(subject.sample(torch.tensor([[3.0, 2.5, 0.0, 0.0]]), [own]).token_ids[0]))
    assert own.output_ids == [0, 1, 0, 1, 0, 1]
    subject.release(own.state_id)
    fresh = row(temperature=0.0, frequency_penalty=1.0)
    assert subject.sample(torch.tensor([[3.0, 2.5, 0.0, 0.0]]), [fresh]).token_ids[0] == 0


def test_logit_bias_bans_and_forces() -> None:
    logits = torch.randn(2, VOCAB)
    rows = [row(temperature=0.0, logit_bias={int(logits[0].argmax()): -100.0}), row(1, logit_bias={7: 100.0})]
    found = draw(logits, rows).token_ids
    assert found[0] == logits[0].topk(2).indices[1]
    assert found[1] == 7


def test_eos_and_stop_tokens_are_banned_until_min_tokens() -> None:
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, [2, 9, 11]] = torch.tensor([3.0, 2.0, 1.0])
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": frozenset({9})}
    found = [int(draw(logits, [row(output=[5] * n, **params)]).token_ids[0]) for n in range(4)]
    assert found == [11, 11, 2, 2]
    assert draw(logits, [row(ignore_eos=True, **params)]).token_ids[0] == 2


def test_a_grammar_mask_allows_only_its_bits() -> None:
    vocab = 70  # not a multiple of 32
    allowed = {3, 31, 32, 69}
    words = np.zeros(3, dtype=np.int32)
    for token in allowed:
        words[token // 32] |= np.int32(np.uint32(1 << token % 32).astype(np.int32))
    free, masked = row(0, seed=3), row(1, seed=4)
    masked.mask = words
    logits = torch.randn(2, vocab)
    seen = set()
    for step in range(300):
        masked.output_ids = free.output_ids = [0] * step
        seen.add(int(draw(logits, [free, masked]).token_ids[1]))
    assert seen == allowed


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(3, VOCAB)
    rows = [
        row(0, temperature=0.0, top_logprobs=3, logit_bias={5: 100.0}),
        row(1, temperature=0.3),
        row(2, temperature=1.9, seed=8, top_logprobs=0),
    ]
    result = draw(logits, rows)
    expected = logits.log_softmax(-1)
    assert result.token_ids[0] == 5
    assert result.logprobs[0] == pytest.approx(float(expected[0, 5]), abs=1e-5)
    ids, values = result.top_ids[0], result.top_logprobs[0]
    assert ids is not None
    assert values is not None
    assert ids.tolist() == expected[0].topk(3).indices.tolist()
    assert np.allclose(values, expected[0].topk(3).values, atol=1e-5)
    assert result.top_ids[1] is None
    assert result.logprobs[1] == 0
    assert result.top_ids[2] is not None
    assert len(result.top_ids[2]) == 0
    assert result.logprobs[2] == pytest.approx(float(expected[2, result.token_ids[2]]), abs=1e-5)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [10, 20]] = 0.0
    for params in ({}, {"top_p": 0.99}, {"top_k": 40}):
        tokens = {int(draw(logits, [row(seed=s, **params)]).token_ids[0]) for s in range(200)}
        assert tokens == {10, 20}


def test_sampling_params_of_a_row_may_be_replaced_between_steps() -> None:
    """The engine narrows max_tokens; nothing may be cached by identity of the params."""
    own = row(temperature=0.0, presence_penalty=1.0, output=[0])
    subject = sampler(3, frozenset())
    assert subject.sample(torch.tensor([[1.5, 1.0, 0.0]]), [own]).token_ids[0] == 1
    own.sampling = replace(own.sampling, presence_penalty=0.0)
    assert subject.sample(torch.tensor([[1.5, 1.0, 0.0]]), [own]).token_ids[0] == 0
