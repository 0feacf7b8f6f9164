"""A row's logits are the same bits whatever runs beside it, however its prompt is cut, wherever its pages lie."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebase_server.engine.runner_torch import TorchRunner
from onebase_server.engine.types import AdapterRef, SamplingParams
from step_driver import Driver, Sequence
from tiny_models import peft_adapter, tiny_model

pytestmark = pytest.mark.slow

BACKENDS = [("native", torch.bfloat16), ("native", torch.float32), ("x86-64-v3", torch.bfloat16)]


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def runner(request: pytest.FixtureRequest, models: Path, make_runner: Callable[..., TorchRunner]) -> TorchRunner:
    backend, dtype = request.param
    made = make_runner("llama", backend, dtype, num_pages=256)
    folder = models / "invariance"
    for slot, rank in enumerate((8, 3)):
        name = f"r{rank}"
        if not (folder / name).exists():
            peft_adapter(tiny_model(models, "llama"), folder, name, seed=rank, r=rank, target_modules="all-linear")
        made.load_slot(slot, made.read_adapter(AdapterRef(name, 1, name, folder / name)))
    return made


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 150),
    chunk=st.integers(1, 80),
    slot=st.sampled_from([-1, 0, 1]),
    others=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([-1, 0, 1])), max_size=6),
    seed=st.integers(0, 1000),
)
def test_logits_are_bit_identical_alone_and_in_any_company(
    runner: TorchRunner, length: int, chunk: int, slot: int, others: list[tuple[int, int]], seed: int
) -> None:
    prompt = [(7 * i + seed) % 317 + 3 for i in range(length)]
    alone = Driver(runner).logits(_add(runner, prompt, slot))
    driver = Driver(runner, seed)
    company = [(driver.add(Sequence([(3 * i) % 300 + 3 for i in range(n)], slot=s)), n) for n, s in others]
    mixed = driver.logits(driver.add(Sequence(prompt, slot=slot)), company, chunk)
    assert torch.equal(alone, mixed)


def test_stale_pages_of_an_earlier_owner_never_show(runner: TorchRunner) -> None:
    prompt = list(range(30, 95))
    clean = Driver(runner).logits(_add(runner, prompt, 0))
    for cache in (runner.cache.k, runner.cache.v):
        cache.fill_(float("nan"))
    assert torch.equal(clean, Driver(runner, 5).logits(_add(runner, prompt, 0), chunk=7))
    runner.cache.k.zero_()
    runner.cache.v.zero_()


def test_copied_pages_continue_like_the_originals(runner: TorchRunner) -> None:
    """Copy on write: two answers of one prefill."""
    driver = Driver(runner)
    original = driver.add(Sequence(list(range(20, 60))))
    driver.step([(original, 39)])
    twin = driver.add(Sequence(original.prompt, pages=[driver.free.pop() for _ in original.pages]))
    runner.copy_pages(list(zip(original.pages, twin.pages, strict=True)))
    twin.done = original.done
    assert len({tuple(tokens) for tokens in driver.generate([original, twin], 8)}) == 1


def test_seeded_samples_do_not_depend_on_the_batch(runner: TorchRunner) -> None:
    sampling = SamplingParams(max_tokens=16, temperature=1.3, top_p=0.9, frequency_penalty=0.5)
    alone = Driver(runner)
    expected = alone.generate([alone.add(Sequence([5, 6, 7, 8], sampling=sampling, seed=42))], 16)[0]
    driver = Driver(runner, 3)
    crowd = [driver.add(Sequence([9 + i, 4, 3], sampling=sampling, seed=i, slot=i % 3 - 1)) for i in range(7)]
    own = driver.add(Sequence([5, 6, 7, 8], sampling=sampling, seed=42))
    answers = driver.generate([*crowd, own], 16, chunk=2)
    assert answers[-1] == expected
    assert len({tuple(answer) for answer in answers}) == 8


def _add(runner: TorchRunner, prompt: list[int], slot: int) -> Sequence:
    return Driver(runner).add(Sequence(prompt, slot=slot))
