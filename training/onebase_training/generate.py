"""Greedy answers from the training process's own model, in batches: for stop rate and checks. Serving is elsewhere."""

from collections.abc import Sequence
from typing import Any

import torch

from onebase_training import attention


def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    batch_tokens: int = 4096,
) -> list[list[int]]:
    """The new ids of each prompt, the end id included when one came; at most `max_new_tokens` each.

    `model` is a (PEFT) causal LM in eval mode. Prompts of like length go together, so that padding stays small.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The packed attention knows no cache and no left padding.
    causal_lm.config._attn_implementation = "sdpa"
    try:
        while order:
            longest = len(prompts[order[-1]]) + max_new_tokens
            count = max(1, batch_tokens // longest)
            group, order = order[-count:], order[:-count]
            for index, ids in zip(
                group, _batch(model, [prompts[i] for i in group], end_ids, pad_id, max_new_tokens), strict=True
            ):
                answers[index] = ids
    finally:
        causal_lm.config._attn_implementation = attention.register()
    return answers


def _batch(
    model: Any, prompts: Sequence[Sequence[int]], end_ids: frozenset[int], pad_id: int, max_new_tokens: int
) -> list[list[int]]:
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(end_ids),
            pad_token_id=pad_id,
            use_cache=True,
        )
    return [_until_end(row, end_ids) for row in out[:, width:].tolist()]


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in end_ids:
            return ids[: place + 1]
    return ids
