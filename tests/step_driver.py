"""Drives a runner without the engine: sequences with pages and slots, steps in any mix and chunking."""

from dataclasses import dataclass, field

import numpy as np
import torch

from onebase_server.engine.runner import SampleRow, StepBatch
from onebase_server.engine.runner_torch import TorchRunner
from onebase_server.engine.types import SamplingParams

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


@dataclass(eq=False)
class Sequence:
    prompt: list[int]
    slot: int = -1
    sampling: SamplingParams = GREEDY
    seed: int = 0
    pages: list[int] = field(default_factory=list)
    row: SampleRow = field(init=False)
    done: int = 0
    """Tokens whose K and V are written."""

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.row.output_ids]


class Driver:
    """Hands out pages in a scattered order, so that nothing works by accident of neighbouring pages."""

    def __init__(self, runner: TorchRunner, seed: int = 0) -> None:
        self.runner = runner
        self.page = runner.limits.page_size
        self.free = np.random.default_rng(seed).permutation(runner.limits.num_pages).tolist()
        self.states = 0

    def add(self, sequence: Sequence) -> Sequence:
        sequence.row = SampleRow(self.states, sequence.sampling, sequence.seed, tuple(sequence.prompt))
        self.states += 1
        return sequence

    def batch(self, work: list[tuple[Sequence, int]]) -> StepBatch:
        """`work`: sequences with how many of their next tokens to run."""
        for sequence, count in work:
            while len(sequence.pages) * self.page < sequence.done + count:
                sequence.pages.append(self.free.pop())
        width = max(len(sequence.pages) for sequence, _ in work)
        tables = np.zeros((len(work), width), dtype=np.int32)
        for i, (sequence, _) in enumerate(work):
            tables[i, : len(sequence.pages)] = sequence.pages
        spans = [(sequence.done, sequence.done + count) for sequence, count in work]
        sampling = [i for i, (sequence, _) in enumerate(work) if spans[i][1] == len(sequence.tokens)]
        return StepBatch(
            token_ids=np.array(
                [t for (s, _), (a, b) in zip(work, spans, strict=True) for t in s.tokens[a:b]], np.int32
            ),
            positions=np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in spans]),
            query_starts=np.concatenate([[0], np.cumsum([b - a for a, b in spans])]).astype(np.int32),
            context_lens=np.array([b for _, b in spans], np.int32),
            block_tables=tables,
            slots=np.array([sequence.slot for sequence, _ in work], np.int32),
            sample_seqs=np.array(sampling, np.int32),
            rows=[work[i][0].row for i in sampling],
        )

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        batch = self.batch(work)
        result = self.runner.run(batch)
        for sequence, count in work:
            sequence.done += count
        for row, token in zip(batch.rows, result.token_ids.tolist(), strict=True):
            row.output_ids.append(token)

    def generate(self, sequences: list[Sequence], count: int, chunk: int = 1 << 30) -> list[list[int]]:
        """All together, prompts in chunks, until each has `count` tokens."""
        while waiting := [s for s in sequences if len(s.row.output_ids) < count]:
            self.step([(s, min(chunk, len(s.tokens) - s.done)) for s in waiting])
        return [s.row.output_ids for s in sequences]

    def logits(self, sequence: Sequence, others: list[tuple[Sequence, int]] = [], chunk: int = 1 << 30) -> torch.Tensor:  # noqa: B006
        """Logits after each token of the prompt [len, V]; `others` run along in the first step."""
        found = []
        while sequence.done < len(sequence.prompt):
            work = [*others, (sequence, min(chunk, len(sequence.prompt) - sequence.done))]
            others = []
            batch = self.batch(work)
            meta, active = self.runner.step_meta(batch)
            own = torch.arange(int(batch.query_starts[-2]), int(batch.query_starts[-1]))
            ids = torch.from_numpy(batch.token_ids)
            found.append(self.runner.forward(ids, meta, active, own).clone())
            for member, count in work:
                member.done += count
        return torch.cat(found)
