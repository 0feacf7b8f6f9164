"""Adapters into slots: at once on a CPU; on a GPU by a stream of their own, laid out and checked by the device.

The GPU's way: the file's bytes go from pinned memory to a scratch buffer, a few strided copies round them into the
slot's rows, and the largest magnitude of every tensor comes back with the event that ends the load: NaN or infinity
there, and the slot never serves. It must not know residency policy, sequences or HTTP.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from onebase.adapter import BaseIdentity
from onebase_server.engine.adapter_plan import Layout, tensor_name
from onebase_server.engine.copy_streams import CudaStreams, Event, Streams
from onebase_server.engine.host_adapter import AdapterReader, PackedAdapter, TorchHostAdapter, not_finite, unpack
from onebase_server.engine.host_memory import HostMemory
from onebase_server.engine.lora_slots import LoraSlots, SlotRows
from onebase_server.engine.runner import HostAdapter

CHUNK_BYTES = 32 << 20
"""Of a file, copied to the device at once."""


class Loader(Protocol):
    """From a folder to host memory (any thread) and on to a slot (engine thread)."""

    def read(self, path: Path) -> HostAdapter: ...

    def load(self, slot: int, adapter: HostAdapter) -> None: ...

    def is_ready(self, slot: int) -> bool:
        """Raises AdapterInvalid, once, if the values that arrived are not finite; then the slot is to be cleared."""
        ...

    def clear(self, slot: int) -> None: ...


class DirectLoader:
    """CPU: laid out and checked by the thread that reads, copied by the one that computes."""

    def __init__(self, slots: LoraSlots, layout: Layout, identity: BaseIdentity | None, max_rank: int) -> None:
        self._slots = slots
        self._dtype = next(iter(slots.a.values())).dtype
        # Single layers: torch would spread larger copies over threads, and those are needed for computing.
        self._reader = AdapterReader(layout, identity, max_rank, longest_run=1)

    def read(self, path: Path) -> TorchHostAdapter:
        return self._reader.read_laid_out(path, self._dtype)

    def load(self, slot: int, adapter: HostAdapter) -> None:
        self._slots.load(slot, cast(TorchHostAdapter, adapter))

    def is_ready(self, slot: int) -> bool:
        return self._slots.owner(slot) is not None

    def clear(self, slot: int) -> None:
        self._slots.clear(slot)


@dataclass(slots=True)
class _Loading:
    """A load under way. It holds the adapter, whose bytes the device still reads."""

    event: Event
    adapter: HostAdapter
    own: SlotRows


class StreamLoader:
    """Any device with streams. All memory is taken at the start."""

    def __init__(
        self,
        slots: LoraSlots,
        layout: Layout,
        identity: BaseIdentity | None,
        *,
        num_slots: int,
        max_rank: int,
        streams: Streams,
        memory: HostMemory,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._slots = slots
        self._layout = layout
        self._streams = streams
        self._memory = memory
        pool = next(iter(slots.a.values()))
        widest = max(*layout.columns.values(), *(offsets[-1] for offsets in layout.offsets.values()))
        self.chunk_bytes = max(chunk_bytes, 4 * max_rank * widest)
        self._reader = AdapterReader(layout, identity, max_rank, chunk_bytes=self.chunk_bytes)
        self._scratch = torch.empty(self.chunk_bytes + 16, dtype=torch.uint8, device=pool.device)
        count = 2 * layout.layers * sum(map(len, layout.modules.values()))
        self._largest = torch.zeros(count, dtype=pool.dtype, device=pool.device)
        is_cuda = pool.device.type == "cuda"
        self._fetched = torch.zeros(num_slots, count, dtype=pool.dtype, pin_memory=is_cuda)
        """By slot: the largest magnitude of each tensor that was loaded, in the order of `_spans`."""
        self._loading: dict[int, _Loading] = {}

    def read(self, path: Path) -> PackedAdapter:
        return self._reader.read_packed(path, self._memory)

    def load(self, slot: int, adapter: HostAdapter) -> None:
        """Enqueue all of it. The bytes travel while steps compute; rows are written, and others' moved, behind the
        steps enqueued so far, and later steps wait for what was moved."""
        self.clear(slot)
        with self._streams.copying():
            if isinstance(adapter, PackedAdapter):
                own = self._load_packed(slot, adapter)
            else:
                host = cast(TorchHostAdapter, adapter)
                self._streams.copies_wait()
                own = self._claim(slot, host)
                self._slots.write(own, host, non_blocking=True)
            self._loading[slot] = _Loading(self._streams.record(), adapter, own)

    def is_ready(self, slot: int) -> bool:
        loading = self._loading.get(slot)
        if loading is None:
            return self._slots.owner(slot) is not None
        if not loading.event.query():
            return False
        self._end(slot)
        if isinstance(loading.adapter, PackedAdapter):
            self._check(slot, loading.adapter, loading.own)
        return True

    def clear(self, slot: int) -> None:
        if slot in self._loading:
            self._loading[slot].event.synchronize()
            self._end(slot)
        self._slots.clear(slot)

    def _end(self, slot: int) -> None:
        adapter = self._loading.pop(slot).adapter
        if isinstance(adapter, PackedAdapter):
            self._memory.let_go(adapter.block)

    def _load_packed(self, slot: int, adapter: PackedAdapter) -> SlotRows:
        data = self._memory.hold(adapter.block)
        try:
            own: SlotRows | None = None
            for chunk in adapter.plan.chunks:
                source = data[chunk.start : chunk.end]
                on_device = self._scratch[: len(source)]
                on_device.copy_(source, non_blocking=True)
                if own is None:
                    self._streams.copies_wait()
                    own = self._claim(slot, adapter)
                    for name in self._slots.a.keys() - adapter.plan.complete:
                        self._slots.blank(own, name)
                unpack(on_device, chunk, self._slots.a, self._slots.b, own.start)
            assert own is not None
            self._measure(slot, own)
        except BaseException:
            self._memory.let_go(adapter.block)
            raise
        return own

    def _claim(self, slot: int, adapter: PackedAdapter | TorchHostAdapter) -> SlotRows:
        moves = self._slots.num_moves
        own = self._slots.claim(slot, adapter.rank, adapter.module_ranks)
        if self._slots.num_moves != moves:
            self._streams.compute_waits()
        return own

    def _measure(self, slot: int, own: SlotRows) -> None:
        """The largest magnitude of every tensor on its way to the host. NaN counts as largest."""
        infinity, layers = float("inf"), self._layout.layers
        for name, index, low, high, at in self._spans(own):
            if index is None:
                part = self._largest[at : at + layers * len(self._layout.modules[name])].view(layers, -1)
                rows = self._slots.a[name][:, :, own.span]
                torch.linalg.vector_norm(rows, infinity, dim=(2, 3), out=part)
            else:
                columns = self._slots.b[name][:, own.span, low:high]
                torch.linalg.vector_norm(columns, infinity, dim=(1, 2), out=self._largest[at : at + layers])
        self._fetched[slot].copy_(self._largest, non_blocking=True)

    def _spans(self, own: SlotRows) -> Iterator[tuple[str, int | None, int, int, int]]:
        """(projection, module, columns of b, place among the magnitudes); module None: all modules' lora_A."""
        at, layers = 0, self._layout.layers
        for name, modules in self._layout.modules.items():
            if not any(own.module_ranks[name]):
                continue
            yield name, None, 0, 0, at
            at += layers * len(modules)
            for index, (low, high) in enumerate(pairwise(self._layout.offsets[name])):
                yield name, index, low, high, at
                at += layers

    def _check(self, slot: int, adapter: PackedAdapter, own: SlotRows) -> None:
        """Raises AdapterInvalid naming the tensors that are not finite."""
        layers = self._layout.layers
        broken: list[str] = []
        for name, index, _, _, at in self._spans(own):
            modules = self._layout.modules[name]
            if index is None:
                part = self._fetched[slot, at : at + layers * len(modules)].view(layers, -1)
                places = [(layer, modules[i], True) for layer, i in (~part.isfinite()).nonzero().tolist()]
            else:
                part = self._fetched[slot, at : at + layers]
                places = [(layer, modules[index], False) for (layer,) in (~part.isfinite()).nonzero().tolist()]
            broken += [tensor_name(layer, module, is_a=is_a) for layer, module, is_a in places]
        if broken:
            raise not_finite(adapter.path, broken, self._fetched.dtype)


def make_loader(
    slots: LoraSlots, layout: Layout, identity: BaseIdentity | None, device: torch.device, config: Any
) -> Loader:
    """The device's way. `config` is a `RunnerConfig`."""
    if device.type != "cuda":
        return DirectLoader(slots, layout, identity, config.max_lora_rank)
    pinned = min(2 * slots.nbytes, 1 << 30) if config.pinned_bytes is None else config.pinned_bytes
    return StreamLoader(
        slots,
        layout,
        identity,
        num_slots=config.num_slots,
        max_rank=config.max_lora_rank,
        streams=CudaStreams(device),
        memory=HostMemory(pinned),
    )
