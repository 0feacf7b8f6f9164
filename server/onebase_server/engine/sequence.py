"""Sequences: how far each generation has got. Made at submission, then the engine thread's alone.

A request of n choices is one `RequestGroup` with n sequences. Only the first computes the prompt; the others follow
it and share its pages.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b

import numpy as np

from onebase_server.engine.detokenizer import Detokenizer
from onebase_server.engine.grammar import GrammarMatcher, Mask
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.prefix_cache import PageKey, extend_keys
from onebase_server.engine.residence import Residence
from onebase_server.engine.runner import SampleRow
from onebase_server.engine.types import FinishReason, GenerationRequest, TokenLogprob


class SequenceStatus(IntEnum):
    NEW = 0
    FOLLOWING = 1
    """Waits for the group's first sequence to compute the prompt."""
    WAITING = 2
    RUNNING = 3
    FINISHED = 4


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request."""

    group: "RequestGroup"
    index: int
    row: SampleRow
    ids: list[int]
    """Prompt, then output."""
    max_tokens: int
    stop_ids: frozenset[int]
    detokenizer: Detokenizer
    keys: list[PageKey]
    """Prefix-cache keys of the full pages of `ids`, as far as they were needed."""
    order: tuple[int, int, int] = (0, 0, 0)
    """(priority, arrival, index): who runs on when pages are short."""
    turn: tuple[int, float, int, int] = (0, 0.0, 0, 0)
    """(priority, fair start tag, arrival, index): who is admitted next."""
    status: SequenceStatus = SequenceStatus.NEW
    num_computed: int = 0
    """Tokens in KV."""
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    waiting_since: float = 0.0
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache at first admission."""
    matcher: GrammarMatcher | None = None
    mask: Mask | None = None
    """The matcher's, filled anew for each token; `row.mask` is it, or None where all is allowed."""
    finish: FinishReason | None = None
    """Set when the last token is known; the last event follows when it is emitted."""
    has_told_prompt: bool = False
    """The logprobs of the prompt are out."""
    is_closed: bool = False
    """The last event has been pushed."""

    @property
    def residence(self) -> Residence | None:
        return self.group.residence

    @property
    def scores_prompt(self) -> bool:
        """Whether it still has tokens of the prompt to give logprobs of. Of a group's choices the first does it."""
        if self.row.sampling.prompt_logprobs is None or self.index:
            return False
        return len(self.group.prompt_logprobs) < len(self.row.prompt_ids) - 1

    def constrain(self, matcher: GrammarMatcher, vocab_size: int) -> None:
        """Only what the grammar allows may be sampled from now on."""
        self.matcher = matcher
        self.mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self.row.mask = self.mask if matcher.rules else None

    def follow_grammar(self) -> None:
        """The last token of `ids` was sampled: whether the next has a mask is known from here on."""
        assert self.matcher is not None
        self.matcher.accept(self.ids[-1])
        self.row.mask = self.mask if self.matcher.rules else None

    def fill_mask(self) -> None:
        """Before the next token is sampled."""
        if self.row.mask is not None:
            assert self.matcher is not None
            self.matcher.fill_mask(self.row.mask)

    def needed_keys(self, page_size: int) -> list[PageKey]:
        """Keys of all full pages of `ids`."""
        if len(self.keys) < len(self.ids) // page_size:
            extend_keys(self.keys, self.group.root, self.ids, page_size)
        return self.keys


@dataclass(slots=True, eq=False)
class RequestGroup:
    """A request and its sequences."""

    request: GenerationRequest
    handle: RequestHandle
    root: PageKey
    submitted_at: float
    sequences: list[Sequence] = field(default_factory=list)
    followers: list[Sequence] = field(default_factory=list)
    """Sequences that wait for the first one's prompt."""
    residence: Residence | None = None
    """Set by the engine when it takes the lease; None for the bare base."""
    num_open: int = 0
    """Sequences without a last event."""
    is_queued: bool = True
    """Counts against `max_queued`."""
    awaits_grammar: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as they were scored."""


def resolve_seed(seed: int, index: int) -> int:
    """The 64-bit seed of choice `index`: the same in any batch, process and version of Python."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8, person=b"onebase-seed").digest()
    return int.from_bytes(digest, "little")
