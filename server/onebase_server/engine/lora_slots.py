"""Adapters in device memory: pools of rank rows shared by all layers, and which rows each slot owns.

Padding-free: an adapter of rank 8 owns 8 rows of every pool, one of rank 64 owns 64. Rows are handed out first fit;
when the free ones are scattered, the owners are moved together. Nothing here knows names, versions or requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from onebase.errors import EngineError
from onebase_server.engine.host_adapter import TorchHostAdapter
from onebase_server.engine.weights import PROJECTIONS, ModelWeights
from onebase_server.engine.zeroed import zeroed
from onebase_server.kernels.ops import LoraPool


@dataclass(slots=True)
class SlotRows:
    """Rows [start, start + rank) of every pool; `module_ranks` has one true rank a module, in `PROJECTIONS` order."""

    start: int
    rank: int
    module_ranks: Mapping[str, tuple[int, ...]]

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.rank)


class LoraSlots:
    """`pools[name]` is a [layers, I, rows, K] and b [layers, rows, N]; `layer(i, name)` is one layer's view."""

    def __init__(self, weights: ModelWeights, rows: int) -> None:
        first = weights.layers[0].projections
        layers = weights.geometry.layers
        self.rows = rows
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.offsets = {name: projection.offsets for name, projection in first.items()}
        for name, projection in first.items():
            n, k = projection.weight.shape
            slices = len(PROJECTIONS[name])
            self.a[name] = zeroed((layers, slices, rows, k), weights.dtype, weights.device)
            self.b[name] = zeroed((layers, rows, n), weights.dtype, weights.device)
        self._pools = [
            {name: LoraPool(self.a[name][i], self.b[name][i], self.offsets[name]) for name in first}
            for i in range(layers)
        ]
        self._owners: dict[int, SlotRows] = {}
        self.rank_table = np.zeros((rows, 8), dtype=np.int32)
        """[rows, 8]: at an adapter's first row, the true rank of each of its modules (q k v o gate up down)."""
        self.num_moves = 0
        """How often rows of adapters in use had to be moved together."""

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.a.values(), *self.b.values()))

    def layer(self, index: int) -> dict[str, LoraPool]:
        return self._pools[index]

    def owner(self, slot: int) -> SlotRows | None:
        return self._owners.get(slot)

    def fits(self, rank: int) -> bool:
        """Whether so many rows are free (gaps are closed when need be)."""
        return sum(own.rank for own in self._owners.values()) + rank <= self.rows

    def load(self, slot: int, adapter: TorchHostAdapter) -> None:
        """Copy an adapter into free rows. Replaces what the slot held. Raises EngineError when the rows run out."""
        self.write(self.claim(slot, adapter.rank, adapter.module_ranks), adapter)

    def claim(self, slot: int, rank: int, module_ranks: Mapping[str, tuple[int, ...]]) -> SlotRows:
        """Free rows for an adapter whose values will follow, instead of what the slot held; may move other adapters'
        rows (`num_moves`). Raises EngineError when the rows run out."""
        self.clear(slot)
        start = self._claim(rank)
        self._owners[slot] = own = SlotRows(start, rank, module_ranks)
        self._note_ranks(own)
        return own

    def write(self, own: SlotRows, adapter: TorchHostAdapter, *, non_blocking: bool = False) -> None:
        """The adapter's values into its rows."""
        for name in self.a:
            if any(adapter.module_ranks[name]):
                self.a[name][:, :, own.span].copy_(adapter.a[name], non_blocking=non_blocking)
                self.b[name][:, own.span].copy_(adapter.b[name], non_blocking=non_blocking)
            else:
                self.blank(own, name)

    def blank(self, own: SlotRows, name: str) -> None:
        """Zeros in the rows of one projection."""
        self.a[name][:, :, own.span].zero_()
        self.b[name][:, own.span].zero_()

    def clear(self, slot: int) -> None:
        """The slot's rows are free. Their values stay until they are overwritten; no token points at them."""
        self._owners.pop(slot, None)

    def active(self, slots: set[int]) -> frozenset[str]:
        """Projections that at least one adapter in these slots changes: the others need no LoRA work this step."""
        owners = [self._owners[slot] for slot in slots if slot >= 0]
        return frozenset(name for name in self.a if any(any(own.module_ranks[name]) for own in owners))

    def _claim(self, rank: int) -> int:
        used = sum(own.rank for own in self._owners.values())
        if used + rank > self.rows:
            raise EngineError(
                f"an adapter of rank {rank} does not fit: {used} of {self.rows} LoRA rows are in use; "
                "raise the number of rows or lower the number of slots"
            )
        start = self._first_fit(rank)
        if start is None:
            self._close_gaps()
            self.num_moves += 1
            start = used
        return start

    def _first_fit(self, rank: int) -> int | None:
        at = 0
        for own in sorted(self._owners.values(), key=lambda own: own.start):
            if own.start - at >= rank:
                return at
            at = own.start + own.rank
        return at if self.rows - at >= rank else None

    def _close_gaps(self) -> None:
        at = 0
        for own in sorted(self._owners.values(), key=lambda own: own.start):
            if own.start != at:
                source, target = slice(own.start, own.start + own.rank), slice(at, at + own.rank)
                for name in self.a:
                    self.a[name][:, :, target] = self.a[name][:, :, source].clone()
                    self.b[name][:, target] = self.b[name][:, source].clone()
                own.start = at
                self._note_ranks(own)
            at += own.rank

    def _note_ranks(self, own: SlotRows) -> None:
        ranks = [rank for name in PROJECTIONS for rank in own.module_ranks[name]]
        self.rank_table[own.start, : len(ranks)] = ranks
