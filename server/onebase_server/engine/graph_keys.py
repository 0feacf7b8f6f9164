"""Which steps are captured as CUDA graphs: the buckets, those captured at the start, and how many are kept.

A graph holds device memory (its nodes' arguments), so their number is bounded and in the memory budget. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Sizes of decode steps that are captured: a step is padded to the next one. Above the last, steps run without a
graph."""
PREFILLS = (32, 64, 96, 128, 192, 256)
"""Tokens of steps in which some sequence has more than one, likewise."""
RANKS = (8, 16, 32, 64, 128, 256, 512)
SHORT_CONTEXT = 512
"""Steps in which no sequence is longer use graphs whose attention is not split for the longest context."""
MAX_LORA_GRAPHS = 160
"""Graphs with LoRA work, beside the bare base's; the one that was not replayed longest makes way for a new one."""
_COMMON = ((frozenset({"qkv"}), 8), (frozenset({"qkv", "o", "gate_up", "down"}), 16))
"""Adapters of the training presets `seed` and `default`: projections and rank."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps of up to `tokens` tokens. `prefill`: some sequence has more than one of them."""

    tokens: int
    prefill: bool = False


@dataclass(frozen=True, slots=True)
class GraphKey:
    bucket: Bucket
    active: frozenset[str]
    """Projections with LoRA work."""
    max_rank: int
    max_context: int
    draws: bool
    """Some row has a temperature; else all take the most likely token."""


def buckets_up_to(max_batch: int, max_prefill: int = PREFILLS[-1]) -> list[Bucket]:
    """Buckets of a runner that takes so many sequences in a step, and prefill of so many tokens into a graph: the
    decode steps first, each kind from small to large."""
    largest = min(max_batch, BATCHES[-1])
    batches = [*(b for b in BATCHES if b < largest), largest]
    return [*map(Bucket, batches), *(Bucket(tokens, prefill=True) for tokens in PREFILLS if tokens <= max_prefill)]


def key_of(bucket: Bucket, active: frozenset[str], max_rank: int, context: int, limit: int, *, draws: bool) -> GraphKey:
    """The graph for a step of `bucket` whose longest context is `context`; `limit`: the model's."""
    short = min(SHORT_CONTEXT, limit)
    rank = next((r for r in RANKS if r >= max_rank), max_rank) if active else 0
    return GraphKey(bucket, active, rank, short if context <= short else limit, draws)


def base_keys(buckets: Sequence[Bucket], limit: int, draws: Sequence[bool]) -> list[GraphKey]:
    """All graphs of the bare base, the largest first: its memory then serves the others."""
    contexts = sorted({min(SHORT_CONTEXT, limit), limit}, reverse=True)
    largest_first = sorted(buckets, key=lambda bucket: -bucket.tokens)
    nothing: frozenset[str] = frozenset()
    return [GraphKey(b, nothing, 0, context, kind) for b in largest_first for context in contexts for kind in draws]


def common_keys(buckets: Sequence[Bucket], limit: int, draws: Sequence[bool], max_rank: int) -> list[GraphKey]:
    """Graphs with LoRA work that are captured at the start: adapters as the presets train them, short contexts."""
    base = [key for key in base_keys(buckets, limit, draws) if key.max_context == min(SHORT_CONTEXT, limit)]
    return [replace(key, active=active, max_rank=rank) for active, rank in _COMMON if rank <= max_rank for key in base][
        :MAX_LORA_GRAPHS
    ]


def most_graphs(max_batch: int, limit: int) -> int:
    """How many graphs a runner may come to hold."""
    return len(base_keys(buckets_up_to(max_batch), limit, (False, True))) + MAX_LORA_GRAPHS
