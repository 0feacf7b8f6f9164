"""Host memory of adapters' files on a GPU machine: one pinned arena made at the start, ordinary memory beyond it.

Pinning takes the driver longer than reading the file, so nothing is pinned later. When the arena runs low, blocks that
were not used longest move to ordinary memory on a thread of its own, so that the next read finds pinned room. It must
not know what the bytes mean. Thread-safe.
"""

import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_ALIGNMENT = 4096


class HostBlock:
    """So many bytes, until the last reference goes. `tensor` may be replaced while nobody holds the block."""

    __slots__ = ("__weakref__", "_finalizer", "_num_holds", "place", "tensor")

    def __init__(self, tensor: Tensor, place: tuple[int, int] | None) -> None:
        self.tensor = tensor
        self.place = place
        """(start, bytes) in the arena; None: ordinary memory."""
        self._num_holds = 1
        self._finalizer: weakref.finalize[..., HostBlock] | None = None


class HostMemory:
    """`arena_bytes` are pinned at once; a `reserve_share` of them is kept free for the next reads."""

    def __init__(self, arena_bytes: int, *, pin: bool = True, reserve_share: float = 0.25) -> None:
        self._arena = torch.empty(arena_bytes // _ALIGNMENT * _ALIGNMENT, dtype=torch.uint8, pin_memory=pin)
        self._reserve = int(len(self._arena) * reserve_share)  # grows to the largest block that was asked for
        self._free: list[tuple[int, int]] = [(0, len(self._arena))] if len(self._arena) else []
        """(start, bytes), in order, never adjacent."""
        self._returned: deque[tuple[int, int]] = deque()
        """Places of blocks that were dropped: a finalizer may run anywhere, even under the lock."""
        self._blocks: OrderedDict[int, weakref.ref[HostBlock]] = OrderedDict()  # by place, longest unused first
        self._lock = threading.Lock()
        self._mover = ThreadPoolExecutor(1, "onebase-unpin")

    @property
    def free_bytes(self) -> int:
        """Of the arena."""
        with self._lock:
            self._take_back()
            return sum(size for _, size in self._free)

    def block(self, nbytes: int) -> HostBlock:
        """A held block, to be filled: pinned if there is room."""
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._take_back()
            self._reserve = max(self._reserve, min(size, len(self._arena)))
            start = self._claim(size)
            if start is None:
                block = HostBlock(torch.empty(nbytes, dtype=torch.uint8), None)
            else:
                block = HostBlock(self._arena[start : start + nbytes], (start, size))
                block._finalizer = weakref.finalize(block, self._returned.append, (start, size))
                block._finalizer.atexit = False
                self._blocks[start] = weakref.ref(block)
            is_low = sum(free for _, free in self._free) < self._reserve
        if is_low and len(self._arena):
            self._mover.submit(self._make_room)
        return block

    def hold(self, block: HostBlock) -> Tensor:
        """The bytes, which stay where they are until `let_go`."""
        with self._lock:
            block._num_holds += 1
            if block.place is not None:
                self._blocks.move_to_end(block.place[0])
            return block.tensor

    def let_go(self, block: HostBlock) -> None:
        """One hold less. After the last one the block may move."""
        with self._lock:
            block._num_holds -= 1
            assert block._num_holds >= 0

    def settle(self) -> None:
        """Wait for blocks on their way out of the arena."""
        self._mover.submit(lambda: None).result()

    def _make_room(self) -> None:
        while block := self._victim():
            ordinary = torch.empty_like(block.tensor, pin_memory=False).copy_(block.tensor)
            with self._lock:
                if block._num_holds == 0 and block.place is not None and block._finalizer is not None:
                    block._finalizer.detach()
                    self._give_back(*block.place)
                    block.tensor, block.place, block._finalizer = ordinary, None, None

    def _victim(self) -> HostBlock | None:
        """The block to move next, or None if there is room enough or nothing may move."""
        with self._lock:
            self._take_back()
            if sum(size for _, size in self._free) >= self._reserve:
                return None
            blocks = (reference() for reference in self._blocks.values())
            return next((block for block in blocks if block is not None and block._num_holds == 0), None)

    def _take_back(self) -> None:
        while self._returned:
            self._give_back(*self._returned.popleft())

    def _claim(self, size: int) -> int | None:
        """First fit."""
        for index, (start, free) in enumerate(self._free):
            if free >= size:
                if free == size:
                    del self._free[index]
                else:
                    self._free[index] = (start + size, free - size)
                return start
        return None

    def _give_back(self, start: int, size: int) -> None:
        del self._blocks[start]
        joined: list[tuple[int, int]] = []
        for at, free in sorted([*self._free, (start, size)]):
            if joined and sum(joined[-1]) == at:
                joined[-1] = (joined[-1][0], joined[-1][1] + free)
            else:
                joined.append((at, free))
        self._free = joined
