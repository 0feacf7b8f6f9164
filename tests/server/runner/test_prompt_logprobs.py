"""Prompt logprobs are those of one plain forward over the prompt, however it is cut and whatever runs beside."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fakes import ManualClock, ManualExecutor
from onebase_server.engine.engine import Engine
from onebase_server.engine.handle import gather_choices
from onebase_server.engine.runner_torch import TorchRunner
from onebase_server.engine.types import GenerationRequest, SamplingParams
from tiny_models import tiny_model

pytestmark = pytest.mark.slow
PROMPT = tuple([1, *range(40, 109)])


class Words:
    vocab_size = 320

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([97 + token_id % 26])


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_they_equal_a_plain_forwards(backend: str, models: Path, make_runner: Callable[..., TorchRunner]) -> None:
    with torch.no_grad():
        logits = tiny_model(models, "llama")(input_ids=torch.tensor([PROMPT])).logits[0, :-1]
    expected = logits.float().log_softmax(-1)
    engine = Engine(
        make_runner("llama", backend, max_batch_tokens=24, max_batch_sequences=6, max_context=128),
        Words(),
        executor=ManualExecutor(),
        clock=ManualClock(),
    )
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    scored = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2)
    # the first fills the prefix cache, from which a prompt that is scored must not be read
    handles = [engine.submit(GenerationRequest("plain", PROMPT, greedy))]
    handles += [engine.submit(GenerationRequest(f"scored-{i}", PROMPT[: 70 - i], scored, n=2)) for i in range(2)]
    while engine.core.has_requests or not handles[0].is_finished:
        engine.core.serve()
        engine.core.step()
    for cut, handle in enumerate(handles[1:]):
        prompt = PROMPT[: 70 - cut]
        for choice in gather_choices(handle.take(), 2):
            assert [each.token_id for each in choice.prompt_logprobs] == list(prompt[1:])
            for place, each in enumerate(choice.prompt_logprobs):
                assert each.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=2e-4)
                best = expected[place].topk(2)
                assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=2e-4)
    assert not any(choice.prompt_logprobs for choice in gather_choices(handles[0].take(), 1))
