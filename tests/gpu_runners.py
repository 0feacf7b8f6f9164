"""Sequences, steps and adapters for tests and benchmarks of the CUDA runner, without an engine."""

import numpy as np

GREEDY = {"max_tokens": 10_000, "temperature": 0.0}


class Sequence:
    def __init__(self, state: int, ids: list[int], slot: int) -> None:
        self.state, self.ids, self.slot, self.computed, self.pages = state, ids, slot, 0, []


def make_batch(sequences: list[Sequence], free: list[int], **sampling):
    from onebase_server.engine.runner import StepBatch

    tokens, positions, starts = [], [], [0]
    for s in sequences:
        new = range(s.computed, len(s.ids))
        tokens += [s.ids[i] for i in new]
        positions += new
        starts.append(len(tokens))
        s.computed = len(s.ids)
        while len(s.pages) * 16 < len(s.ids):
            s.pages.append(free.pop())
    tables = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), dtype=np.int32)
    for i, s in enumerate(sequences):
        tables[i, : len(s.pages)] = s.pages

    def ints(values):
        return np.array(values, dtype=np.int32)

    rows = make_rows(sequences, **sampling)
    lengths = ints([len(s.ids) for s in sequences])
    slots = ints([s.slot for s in sequences])
    every = ints(range(len(sequences)))
    return StepBatch(ints(tokens), ints(positions), ints(starts), lengths, tables, slots, every, rows)


def make_rows(sequences: list[Sequence], **sampling):
    from onebase_server.engine.runner import SampleRow
    from onebase_server.engine.types import SamplingParams

    params = SamplingParams(**{**GREEDY, **sampling})
    return [SampleRow(s.state, params, 1, tuple(s.ids)) for s in sequences]


def random_adapter(runner, rank: int, targets, scale: float = 0.02, generator=None):
    """In pinned memory, as a loader would read it. `targets`: the projections that it changes; others have rank 0."""
    import torch

    from onebase_server.engine.host_adapter import TorchHostAdapter

    def values(pool, axis: int):
        shape = list(pool.shape)
        shape[axis] = rank
        return (torch.randn(shape, generator=generator) * scale).bfloat16().pin_memory()

    a = {name: values(pool, 2) for name, pool in runner.slots.a.items()}
    b = {name: values(pool, 1) for name, pool in runner.slots.b.items()}
    ranks = {n: tuple(rank if n in targets else 0 for _ in range(pool.shape[1])) for n, pool in a.items()}
    return TorchHostAdapter(rank=rank, a=a, b=b, module_ranks=ranks)
