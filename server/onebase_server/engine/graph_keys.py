"""Which decode steps are captured as CUDA graphs: the buckets, those captured at the start, and how many are kept.

A graph holds device memory (its nodes' arguments), so their number is bounded and in the memory budget. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Sizes at which graphs are captured: a step is padded to the next one. Above the last, steps run without a graph."""
RANKS = (8, 16, 32, 64, 128, 256, 512)
SHORT_CONTEXT = 512
"""Steps in which no sequence is longer use graphs whose attention is not split for the longest context."""
MAX_LORA_GRAPHS = 128
"""Graphs with LoRA work, beside the bare base's; the one that was not replayed longest makes way for a new one."""
_COMMON = ((frozenset({"qkv"}), 8), (frozenset({"qkv", "o", "gate_up", "down"}), 16))
"""Adapters of the training presets `seed` and `default`: projections and rank."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    batch: int
    active: frozenset[str]
    """Projections with LoRA work."""
    max_rank: int
    max_context: int
    draws: bool
    """Some row has a temperature; else all take the most likely token."""


def batches_up_to(max_batch: int) -> list[int]:
    """Buckets of a runner that takes so many sequences in a step."""
    largest = min(max_batch, BATCHES[-1])
    return [b for b in BATCHES if b < largest] + [largest]


def key_of(batch: int, active: frozenset[str], max_rank: int, context: int, limit: int, *, draws: bool) -> GraphKey:
    """The graph for a step of the bucket `batch` whose longest context is `context`; `limit`: the model's."""
    short = min(SHORT_CONTEXT, limit)
    rank = next((r for r in RANKS if r >= max_rank), max_rank) if active else 0
    return GraphKey(batch, active, rank, short if context <= short else limit, draws)


def base_keys(batches: Sequence[int], limit: int, draws: Sequence[bool]) -> list[GraphKey]:
    """All graphs of the bare base, the largest first: its memory then serves the others."""
    contexts = sorted({min(SHORT_CONTEXT, limit), limit}, reverse=True)
    nothing: frozenset[str] = frozenset()
    return [GraphKey(b, nothing, 0, context, kind) for b in reversed(batches) for context in contexts for kind in draws]


def common_keys(batches: Sequence[int], limit: int, draws: Sequence[bool], max_rank: int) -> list[GraphKey]:
    """Graphs with LoRA work that are captured at the start: adapters as the presets train them, short contexts."""
    base = [key for key in base_keys(batches, limit, draws) if key.max_context == min(SHORT_CONTEXT, limit)]
    return [replace(key, active=active, max_rank=rank) for active, rank in _COMMON if rank <= max_rank for key in base][
        :MAX_LORA_GRAPHS
    ]


def most_graphs(max_batch: int, limit: int) -> int:
    """How many graphs a runner may come to hold."""
    return len(base_keys(batches_up_to(max_batch), limit, (False, True))) + MAX_LORA_GRAPHS
