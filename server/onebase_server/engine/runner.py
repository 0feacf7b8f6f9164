"""The border between the engine (plain Python) and the device (torch): one protocol, numpy across it.

Everything above runs in tests with a fake runner in milliseconds. `TorchRunner` (runner_torch.py) is the real one.
Legend: S sequences in the step, T tokens in the step, R sequences that sample, B pages in the widest block table.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from onebase.errors import EngineError
from onebase_server.engine.types import AdapterRef, SamplingParams

Int32 = NDArray[np.int32]


class DeviceLost(EngineError):
    """The device can't go on (an illegal access, out of memory): the process must be restarted."""


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What the runner was built for; the scheduler plans inside it."""

    vocab_size: int
    max_context: int
    page_size: int
    """Tokens in a KV page."""
    num_pages: int
    num_slots: int
    """Adapters that fit in one step."""
    max_batch_tokens: int
    """Token budget of one step (decode tokens + prefill chunks)."""
    max_batch_sequences: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class SampleRow:
    """What the sampler needs to know of one sampling sequence; lives as long as the sequence (same object each
    step), so a runner may keep device state keyed by `state_id`."""

    state_id: int
    """Small integer below max_batch_sequences, unique among running sequences, reused after release. A preempted
    sequence comes back under a new one, with `output_ids` already filled: build state from the ids, not from zero."""
    sampling: SamplingParams
    seed: int
    """Resolved 64-bit seed of this choice."""
    prompt_ids: tuple[int, ...]
    output_ids: list[int] = field(default_factory=list)
    """Grows by one each sampled step; its length is the step number of the random stream."""
    mask: NDArray[np.int32] | None = None
    """Constrained decoding: packed allowed-token bitmask (ceil(V/32) words) for the next token, or None. At `launch`
    only whether there is one counts: its words are there when `collect` (or `run`) is called."""


@dataclass(slots=True)
class StepBatch:
    """One forward pass over mixed prefill chunks and decode tokens, packed without padding.

    The arrays are fresh each step. `sample_seqs` may name one sequence several times: n answers to one prompt take
    their first tokens from the same logits, each with its own row."""

    token_ids: Int32  # [T]
    positions: Int32  # [T]
    query_starts: Int32  # [S+1] prefix sums of each sequence's tokens in this step
    context_lens: Int32  # [S] tokens in KV after this step
    block_tables: Int32  # [S, B] page numbers; unused entries are 0
    slots: Int32  # [S] LoRA slot, -1 for the bare base
    sample_seqs: Int32  # [R] which of the S sequences sample after this step (their last token's logits)
    rows: list[SampleRow]  # [R]
    scored: Int32 = field(default_factory=lambda: np.zeros(0, dtype=np.int32))  # [K] which of the T tokens
    score_targets: Int32 = field(default_factory=lambda: np.zeros(0, dtype=np.int32))  # [K]
    """Prompt logprobs: after token `scored[i]` comes `score_targets[i]`, and how likely is that?"""
    score_top: int = 0
    """So many alternatives of each are wanted too."""


@dataclass(slots=True)
class StepResult:
    token_ids: Int32  # [R]
    logprobs: NDArray[np.float32]  # [R] of the chosen token, 0 where not asked
    top_ids: list[Int32 | None]  # [R] each [k] or None
    top_logprobs: list[NDArray[np.float32] | None]
    scores: "Scores | None" = None
    """Of the batch's `scored` tokens, if there are any."""


@dataclass(slots=True)
class Scores:
    logprobs: NDArray[np.float32]  # [K]
    top_ids: Int32  # [K, score_top]
    top_logprobs: NDArray[np.float32]  # [K, score_top]


class HostAdapter(Protocol):
    """An adapter's weights in host memory, ready to copy into a slot. Opaque above the runner."""

    @property
    def nbytes(self) -> int: ...


class Runner(Protocol):
    """Owns the device. Called from the engine thread only, except `read_adapter`."""

    @property
    def limits(self) -> RunnerLimits: ...

    def read_adapter(self, ref: AdapterRef) -> HostAdapter:
        """Disk -> host (pinned on CUDA). Thread-safe; called off the engine thread.

        Raises AdapterInvalid when the files don't fit the base. Whether the values are finite may be seen here or,
        where the device looks, by `slot_ready`."""
        ...

    def can_load(self, adapter: HostAdapter) -> bool:
        """Whether the pool has room for it beside what the slots hold now (a free slot is the caller's affair)."""
        ...

    def load_slot(self, slot: int, adapter: HostAdapter) -> None:
        """Start the copy host -> device slot. May be asynchronous: see `slot_ready`.

        DeviceLost, here and in the two methods below, when the device faulted or has no memory left: that is no
        adapter's fault. Any other exception fails this adapter's requests only."""
        ...

    def slot_ready(self, slot: int) -> bool:
        """True once a started copy can be used by the next step.

        Raises AdapterInvalid if the values turned out not to be finite: the slot is then to be cleared."""
        ...

    def clear_slot(self, slot: int) -> None:
        """The slot's version is gone; its memory may be reused."""
        ...

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy KV page src -> dst (copy on write)."""
        ...

    def run(self, batch: StepBatch) -> StepResult:
        """Forward + sample. Blocks until the sampled tokens are on the host.

        While `len(row.output_ids) < sampling.min_tokens` eos and `stop_token_ids` must not be sampled.
        Raises DeviceLost when no later step can work; any other exception fails this batch's requests only."""
        ...

    def release_state(self, state_id: int) -> None:
        """The sequence with this sampler state has ended."""
        ...


@runtime_checkable
class OverlappingRunner(Runner, Protocol):
    """A runner whose device works on while the engine does: step k's tokens are emitted while k + 1 runs.

    One ticket at a time; between the two calls nothing but `read_adapter` is called. A sequence that a stop string
    ends meanwhile stays in the step, and its sampled token is ignored."""

    def launch(self, batch: StepBatch) -> object:
        """Start a step and return at once."""
        ...

    def collect(self, ticket: object) -> StepResult:
        """Wait for the sampled tokens of a started step."""
        ...
