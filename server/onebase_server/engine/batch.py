"""Packs the sequences of one step into the arrays that cross to the runner."""

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from onebase_server.engine.runner import Int32, RunnerLimits, StepBatch
from onebase_server.engine.sequence import Sequence


@dataclass(slots=True)
class StepPlan:
    """What the scheduler chose for one step. Decoding sequences come first, then prefill chunks."""

    sequences: list[Sequence] = field(default_factory=list)  # S
    counts: list[int] = field(default_factory=list)  # S: tokens of each in this step
    sampling: list[Sequence] = field(default_factory=list)  # R
    sample_seqs: list[int] = field(default_factory=list)  # R: index into `sequences`
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    """(leader, follower): the follower samples from the leader's logits and then shares its pages."""


class BlockTables:
    """One row of page numbers a running sequence, indexed by its state id: a step gathers rows, it builds none."""

    def __init__(self, limits: RunnerLimits) -> None:
        width = -(-limits.max_context // limits.page_size)
        self._page_size = limits.page_size
        self.rows: Int32 = np.zeros((limits.max_batch_sequences, width), dtype=np.int32)

    def gather(self, states: list[int], max_context: int) -> Int32:
        """[S, B] with B just wide enough for the longest context."""
        return self.rows[states, : -(-max_context // self._page_size)]


def pack(plan: StepPlan, tables: BlockTables) -> StepBatch:
    """The plan as arrays, fresh each step: a runner that works on while the next is packed may keep them."""
    token_ids: list[int] = []
    positions: list[int] = []
    context_lens: list[int] = []
    states: list[int] = []
    slots: list[int] = []
    for sequence, count in zip(plan.sequences, plan.counts, strict=True):
        start = sequence.num_computed
        if count == 1:
            token_ids.append(sequence.ids[start])
            positions.append(start)
        else:
            token_ids.extend(sequence.ids[start : start + count])
            positions.extend(range(start, start + count))
        context_lens.append(start + count)
        states.append(sequence.row.state_id)
        slots.append(sequence.slot)
    scored, targets, top = _scored(plan)
    return StepBatch(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        query_starts=np.array([0, *accumulate(plan.counts)], dtype=np.int32),
        context_lens=np.array(context_lens, dtype=np.int32),
        block_tables=tables.gather(states, max(context_lens)),
        slots=np.array(slots, dtype=np.int32),
        sample_seqs=np.array(plan.sample_seqs, dtype=np.int32),
        rows=[sequence.row for sequence in plan.sampling],
        scored=np.array(scored, dtype=np.int32),
        score_targets=np.array(targets, dtype=np.int32),
        score_top=top,
    )


def _scored(plan: StepPlan) -> tuple[list[int], list[int], int]:
    """Places among the step's tokens, what follows each in its prompt, and the most alternatives that one wants."""
    places: list[int] = []
    targets: list[int] = []
    top = 0
    if any(sequence.scores_prompt for sequence in plan.sequences):
        place = 0
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            for position in scored_positions(sequence, count):
                places.append(place + position - sequence.num_computed)
                targets.append(sequence.ids[position + 1])
                top = max(top, sequence.row.sampling.prompt_logprobs or 0)
            place += count
    return places, targets, top


def scored_positions(sequence: Sequence, count: int) -> range:
    """Of the next `count` tokens, those whose following token is to be scored and has not been yet."""
    if not sequence.scores_prompt:
        return range(0)
    done = len(sequence.group.prompt_logprobs)
    end = min(sequence.num_computed + count, len(sequence.row.prompt_ids) - 1)
    return range(max(sequence.num_computed, done), end)
