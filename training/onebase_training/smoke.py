"""A version has to speak before it is published: a few greedy tokens from the trained weights, on prompts they know.

Weights can be finite, written well, and still good for nothing: numbers that overflow in the forward pass, or an
adapter that has learnt to end every answer before its first word. It is the trainer's own forward pass, without a
cache: a few short prompts and a few tokens cost less than one step.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import torch

from onebase.errors import TrainingError
from onebase_training.rows import Row

PROMPTS: Final = 3
TOKENS: Final = 8


def check_speaks(model: Any, rows: Sequence[Row], end_ids: Collection[int]) -> list[list[int]]:
    """The answers' ids, one list a prompt. Raises TrainingError for a logit that is not finite, and if every answer is
    empty. `model` is the (PEFT) causal LM that was trained; it is left in eval mode.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.eval()
    answers = [_answer(causal_lm, prompt, end_ids) for prompt in _prompts(rows)]
    if answers and not any(answers):
        raise TrainingError(
            f"the trained adapter ends {len(answers)} of {len(answers)} answers before their first word, nothing "
            "published: train with a lower learning rate, or look at what the data teaches",
            code="smoke_test_failed",
        )
    return answers


def _prompts(rows: Sequence[Row]) -> list[list[int]]:
    """The shortest: they cost least. A text without turns is begun and left to go on."""
    found = sorted((prompt for row in rows if (prompt := _prompt(row))), key=len)
    return found[:PROMPTS]


def _prompt(row: Row) -> list[int]:
    start = next((start for start, _ in row.answers() if start > 1), len(row) // 2)
    return [int(token) for token in row.ids[:start]]


def _answer(causal_lm: Any, prompt: list[int], end_ids: Collection[int]) -> list[int]:
    answer = []
    for token in _greedy(causal_lm, prompt):
        if token in end_ids:
            break
        answer.append(token)
    return answer


def _greedy(causal_lm: Any, prompt: list[int]) -> Iterator[int]:
    ids = list(prompt)
    device = causal_lm.lm_head.weight.device
    for _ in range(TOKENS):
        given = torch.tensor([ids], device=device)
        with torch.no_grad():
            hidden = causal_lm.model(
                input_ids=given, position_ids=torch.arange(len(ids), device=device)[None], use_cache=False, borders=None
            ).last_hidden_state
            logits = hidden[0, -1].to(causal_lm.lm_head.weight.dtype) @ causal_lm.lm_head.weight.T
        if not torch.isfinite(logits).all():
            raise TrainingError(
                "the trained adapter's answer is not finite (NaN or infinity in its logits), nothing published: train "
                "with a lower learning rate",
                code="smoke_test_failed",
            )
        ids.append(int(logits.argmax()))
        yield ids[-1]
