"""What a request asks to change in its own logits before the draw: mask, bans, biases, penalties.

All edits are sparse lists of (row, token) built on the host and applied by a few scatters for the whole batch; a batch
without edits costs nothing. Which tokens a live sequence has seen is kept here by `state_id`.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onebase_server.engine.put import put
from onebase_server.engine.runner import SampleRow
from onebase_server.engine.types import SamplingParams


@dataclass(slots=True)
class EditState:
    """Tokens that a live sequence has seen, kept up to date a step at a time."""

    prompt: frozenset[int]
    counts: dict[int, int] = field(default_factory=dict)
    seen: int = 0

    def catch_up(self, output_ids: list[int]) -> None:
        for token in output_ids[self.seen :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self.seen = len(output_ids)


def apply_edits(
    logits: Tensor, rows: list[SampleRow], states: dict[int, EditState], eos_token_ids: frozenset[int]
) -> None:
    """Edit logits [R, V] in place."""
    _mask(logits, rows)
    banned = [(i, token) for i, row in enumerate(rows) for token in banned_tokens(row, eos_token_ids)]
    if banned:
        index = _index(logits, banned)
        logits[index] = float("-inf")
    biased = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.sampling.logit_bias.items()]
    if biased:
        index = _index(logits, [(i, token) for i, token, _ in biased])
        logits[index] += _values(logits, [bias for _, _, bias in biased])
    _penalise(logits, rows, states)


def banned_tokens(row: SampleRow, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Ids that would end the answer before `min_tokens`."""
    sampling = row.sampling
    if len(row.output_ids) >= sampling.min_tokens:
        return frozenset()
    return sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids | eos_token_ids


def has_penalty(sampling: SamplingParams) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def has_edits(row: SampleRow) -> bool:
    sampling = row.sampling
    early = len(row.output_ids) < sampling.min_tokens
    return row.mask is not None or early or bool(sampling.logit_bias) or has_penalty(sampling)


def _mask(logits: Tensor, rows: list[SampleRow]) -> None:
    """Constrained decoding: bit t of word t // 32 allows token t. Tokens past the last word are not allowed."""
    masked = [i for i, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return
    words = np.stack([row.mask for row in rows if row.mask is not None]).astype("<i4", copy=False)
    bits = np.unpackbits((~words).view(np.uint8), axis=-1, bitorder="little")[:, : logits.shape[-1]]
    banned = put(bits.view(bool), logits.device)
    known = bits.shape[1]
    for i, each in zip(masked, banned, strict=True):  # in place: a gather and a scatter of whole rows cost thrice that
        logits[i, :known].masked_fill_(each, float("-inf"))
        logits[i, known:] = float("-inf")


def _penalise(logits: Tensor, rows: list[SampleRow], states: dict[int, EditState]) -> None:
    """Repetition counts prompt and answer, frequency and presence the answer only, as vLLM and OpenAI do."""
    places: list[tuple[int, int]] = []
    factors: list[float] = []
    minus: list[float] = []
    for i, row in enumerate(rows):
        sampling = row.sampling
        if not has_penalty(sampling):
            continue
        state = states.setdefault(row.state_id, EditState(frozenset(row.prompt_ids)))
        state.catch_up(row.output_ids)
        tokens = state.counts.keys() | state.prompt if sampling.repetition_penalty != 1.0 else state.counts.keys()
        for token in tokens:
            count = state.counts.get(token, 0)
            places.append((i, token))
            factors.append(sampling.repetition_penalty)
            minus.append(sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0))
    if not places:
        return
    index = _index(logits, places)
    values = logits[index]
    factor = _values(logits, factors)
    values = torch.where(values > 0, values / factor, values * factor)
    logits[index] = values - _values(logits, minus)


def _index(logits: Tensor, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    both = put(np.array(places, dtype=np.int64), logits.device)
    return both[:, 0], both[:, 1]


def _values(logits: Tensor, values: list[float]) -> Tensor:
    return put(np.array(values), logits.device).to(logits.dtype)
