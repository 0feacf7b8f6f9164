"""Vectorised sampling: logits [R, V] and each row's own parameters -> one token a row, and logprobs where asked.

Order and meaning are vLLM's: grammar mask, min_tokens ban, logit_bias, repetition then frequency and presence
penalties, temperature, min_p, top_k, top_p. Logprobs are of the model's own distribution, before all of it.
Randomness is one uniform of (seed, step) put through the inverse CDF in a fixed order, so a row's token never
depends on its neighbours. It must not know text, adapters or the scheduler.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase_server.engine.logit_edits import EditState, apply_edits
from onebase_server.engine.put import put
from onebase_server.engine.runner import SampleRow, Scores, StepResult
from onebase_server.engine.types import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures (and top_p) at or below this mean argmax."""

_CANDIDATES = 1024
"""Sorted candidates looked at first; rows whose top_p reaches further are sorted whole."""


Chooser = Callable[[Tensor, list[SampleRow]], NDArray[np.int64]]
"""Edited logits [R, V] fp32 and rows -> tokens [R]."""


class Sampler:
    """Keeps the token counts of live sequences by `state_id`; everything else is computed a step at a time.

    `choose`: a backend's own draw instead of the one in torch."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        eos_token_ids: frozenset[int],
        choose: Chooser | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.eos_token_ids = eos_token_ids
        self._states: dict[int, EditState] = {}
        self._choose: Chooser = choose or choose_in_torch

    def release(self, state_id: int) -> None:
        self._states.pop(state_id, None)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> StepResult:
        """logits [R, V] fp32 (may be overwritten); rows in the same order."""
        count = len(rows)
        logprobs = np.zeros(count, dtype=np.float32)
        top_ids: list[NDArray[np.int32] | None] = [None] * count
        top_logprobs: list[NDArray[np.float32] | None] = [None] * count
        wanted = [i for i, row in enumerate(rows) if row.sampling.top_logprobs is not None]
        raw = logits[put(np.array(wanted), self.device)] if wanted else None
        apply_edits(logits, rows, self._states, self.eos_token_ids)
        tokens = self._choose(logits, rows).astype(np.int32)
        if raw is not None:
            chosen, ids, values = _logprobs(raw, tokens[wanted], _most([rows[i].sampling for i in wanted]))
            logprobs[wanted] = chosen
            for j, i in enumerate(wanted):
                k = rows[i].sampling.top_logprobs or 0
                top_ids[i], top_logprobs[i] = ids[j, :k], values[j, :k]
        return StepResult(tokens, logprobs, top_ids, top_logprobs)


def score(logits: Tensor, targets: NDArray[np.int32], top: int) -> Scores:
    """Logprobs of given tokens: logits [K, V] fp32, targets [K]."""
    return Scores(*_logprobs(logits, targets, top))


def choose_in_torch(logits: Tensor, rows: list[SampleRow]) -> NDArray[np.int64]:
    plain: list[int] = []
    cut: list[int] = []
    greedy: list[int] = []
    for i, row in enumerate(rows):
        (greedy if is_greedy(row.sampling) else cut if is_truncated(row.sampling) else plain).append(i)
    if len(greedy) == len(rows):
        return logits.argmax(-1).cpu().numpy()
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for chosen, draw in ((greedy, _likeliest), (plain, _draw_plain), (cut, _draw_truncated)):
        if chosen:
            places = put(np.array(chosen), logits.device)
            tokens[places] = draw(logits[places], [rows[i] for i in chosen])
    return tokens.cpu().numpy()


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature <= GREEDY_BELOW or sampling.top_p <= GREEDY_BELOW or sampling.top_k == 1


def is_truncated(sampling: SamplingParams) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def uniforms(rows: list[SampleRow], ahead: int = 0) -> NDArray[np.float64]:
    """One number in (0, 1) a row from (seed, step): two rounds of splitmix64's finaliser, 53 bits. `ahead`: of a later
    step."""
    seeds = np.array([row.seed & 0xFFFFFFFFFFFFFFFF for row in rows], dtype=np.uint64)
    steps = np.array([len(row.output_ids) + ahead for row in rows], dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _splitmix(_splitmix(seeds) ^ (steps * np.uint64(0xD1342543DE82EF95) + np.uint64(1)))
    return (np.asarray(mixed >> np.uint64(11), dtype=np.float64) + 0.5) * 2.0**-53


def _splitmix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _likeliest(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    return logits.argmax(-1)


def _draw_plain(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """No truncation: inverse CDF over the vocabulary in id order."""
    weights = _weights(logits, rows)
    return _invert(weights.cumsum(-1), rows)


def _draw_truncated(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """min_p, top_k and top_p: inverse CDF over the kept tokens, likeliest first."""
    weights = _weights(logits, rows)
    wide = min(_CANDIDATES, weights.shape[-1])
    values, ids = weights.topk(wide, dim=-1)
    cdf, settled = _kept_cdf(values, weights, rows)
    is_closed = all(0 < row.sampling.top_k <= wide for row in rows)  # told without asking the device
    if wide < weights.shape[-1] and not is_closed and not settled:
        values, ids = weights.sort(dim=-1, descending=True, stable=True)
        cdf, _ = _kept_cdf(values, weights, rows)
    return ids.gather(-1, _invert(cdf, rows)[:, None])[:, 0]


def _weights(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """exp((logit - max) / temperature) in fp64: not normalised, 0 for banned tokens."""
    temperature = _column(logits, [row.sampling.temperature for row in rows])
    wide = logits.double()
    return ((wide - wide.amax(-1, keepdim=True)) / temperature).exp()


def _kept_cdf(values: Tensor, weights: Tensor, rows: list[SampleRow]) -> tuple[Tensor, Tensor]:
    """Running sums over the sorted candidates, flat from where each row's kept set ends; and whether every row's
    kept set ends inside the candidates. top_p is of the mass that min_p and top_k left, as in vLLM."""
    count, vocab = values.shape[-1], weights.shape[-1]
    rank = torch.arange(count, device=values.device)
    min_p = _column(values, [row.sampling.min_p for row in rows])
    top_k = _column(values, [row.sampling.top_k or vocab for row in rows])
    top_p = _column(values, [row.sampling.top_p for row in rows])
    inside = (values >= min_p * values[:, :1]) & (rank < top_k)
    closed = (top_k <= count) | (values[:, -1:] < min_p * values[:, :1])
    mass = torch.where(inside, values, 0.0)
    running = mass.cumsum(-1)
    # Rows that neither min_p nor top_k closes have their mass in the tail too. Sorted whole, the sum is exact.
    total = torch.where(closed, running[:, -1:], weights.sum(-1, keepdim=True))
    kept = inside & ((running - mass < top_p * total) | (rank == 0))
    settled = (closed | (running[:, -1:] >= top_p * total)).all()
    return torch.where(kept, values, 0.0).cumsum(-1), settled


def _invert(cdf: Tensor, rows: list[SampleRow]) -> Tensor:
    """First index whose running sum exceeds u * total; never one of weight 0."""
    total = cdf[:, -1:].contiguous()
    u = put(uniforms(rows), cdf.device)[:, None]
    found = torch.searchsorted(cdf, u * total, right=True)
    last = torch.searchsorted(cdf, total)
    return torch.minimum(found, last)[:, 0].clamp(max=cdf.shape[-1] - 1)


def _column(like: Tensor, values: list[float]) -> Tensor:
    return put(np.array(values, dtype=np.float64), like.device)[:, None]


def _most(samplings: list[SamplingParams]) -> int:
    return max((sampling.top_logprobs or 0) for sampling in samplings)


def _logprobs(
    raw: Tensor, tokens: NDArray[np.int32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """Chosen token's logprob [r], and the k likeliest ids and logprobs [r, k]."""
    normaliser = raw.logsumexp(-1)
    index = put(tokens.astype(np.int64), raw.device)[:, None]
    chosen = raw.gather(-1, index)[:, 0] - normaliser
    values, ids = raw.topk(k, dim=-1) if k else (raw[:, :0], torch.empty(len(raw), 0, dtype=torch.int64))
    values = values - normaliser[:, None]
    return chosen.cpu().numpy(), ids.cpu().numpy().astype(np.int32), values.cpu().numpy()
