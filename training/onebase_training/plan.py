"""The order of a run, fixed before it starts: which rows make each step, and how a step is cut into micro-batches.

A step is `batch_size` rows, drawn without replacement epoch by epoch from a generator seeded by (seed, epoch). So
step k is the same rows whatever came before: resuming needs no sampler state, and 2 processes share a step's rows
without changing it. No torch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onebase.errors import RecipeError
from onebase_training.config import TrainConfig
from onebase_training.rows import Row


@dataclass(frozen=True, slots=True)
class Plan:
    """`steps[k]` holds the indices of the rows of step k; `epoch_ends` the numbers of steps that end an epoch."""

    steps: tuple[tuple[int, ...], ...]
    epoch_ends: tuple[int, ...]
    epochs: float

    def __len__(self) -> int:
        return len(self.steps)


def make_plan(weights: Sequence[float], config: TrainConfig) -> Plan:
    """`weights[i]` says how often an epoch shows row i (2.5: twice, and in every other epoch a third time).

    After E epochs row i has been shown E * weights[i] times, up or down to a whole number; which rows are early is
    spread evenly over neighbours, so that a file of weight 0.2 shows a fifth of its rows in each epoch.
    """
    epochs = automatic_epochs(round(sum(weights))) if config.epochs == "auto" else float(config.epochs)
    phases = _phases(len(weights), config.seed)
    steps: list[tuple[int, ...]] = []
    ends: list[int] = []
    for epoch in range(math.ceil(epochs)) if config.max_steps is None else itertools.count():
        order = _epoch_order(weights, phases, config.seed, epoch)
        if config.max_steps is None and epoch + 1 > epochs:  # the last, partial epoch
            order = order[: round(len(order) * (epochs - epoch))]
        steps += [tuple(order[start : start + config.batch_size]) for start in range(0, len(order), config.batch_size)]
        ends.append(len(steps))
        if config.max_steps is not None and len(steps) >= config.max_steps:
            epochs, steps = float(epoch + 1), steps[: config.max_steps]
            break
    if not steps:
        raise RecipeError(
            f"data.train: with these weights {epochs:g} epochs show no row; raise train.epochs or the weights",
            param="data.train",
        )
    ends = sorted({min(end, len(steps)) for end in ends} - {0})
    return Plan(tuple(steps), tuple(ends), epochs)


def automatic_epochs(rows: int) -> int:
    """The rule of OpenAI's cookbook: 3, more below 100 examples seen, fewer above 25,000."""
    if 3 * rows < 100:
        return min(25, max(1, 100 // max(1, rows)))
    if 3 * rows > 25_000:
        return max(1, 25_000 // rows)
    return 3


def micro_batches(rows: Sequence[Row], tokens_at_once: int, *, packing: bool) -> list[list[int]]:
    """Cut a step's rows into groups that go through at once: few, of at most `tokens_at_once` tokens (or one row).

    Packed rows count their own tokens; padded ones count as many as the longest of their group.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    groups: list[list[int]] = []
    sizes: list[int] = []
    for index in order:
        length = len(rows[index])
        for group, size in enumerate(sizes):
            grown = size + length if packing else len(rows[groups[group][0]]) * (len(groups[group]) + 1)
            if grown <= tokens_at_once:
                groups[group].append(index)
                sizes[group] = grown
                break
        else:
            groups.append([index])
            sizes.append(length)
    return groups


def _phases(count: int, seed: int) -> NDArray[np.float64]:
    """Where in 0..1 each row's count of showings begins: multiples of the golden ratio, which lie evenly over any run
    of neighbours. Whole 2**-20ths, so that sums with whole weights are exact."""
    start = np.random.Generator(np.random.PCG64(seed)).random()
    phases = (start + np.arange(count) * ((math.sqrt(5) - 1) / 2)) % 1.0
    return np.asarray(np.floor(phases * 2**20) / 2**20, np.float64)


def _epoch_order(weights: Sequence[float], phases: NDArray[np.float64], seed: int, epoch: int) -> list[int]:
    each = np.asarray(weights, np.float64)
    counts = np.floor((epoch + 1) * each + phases) - np.floor(epoch * each + phases)
    order = np.repeat(np.arange(len(each)), counts.astype(np.int64))
    np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
    return [int(index) for index in order]
