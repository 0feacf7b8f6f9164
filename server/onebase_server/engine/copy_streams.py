"""The two queues of a GPU that a load has to do with, behind a protocol, so that their order can be tested without one.

Who waits for whom is `slot_loader.py`'s business.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch


class Event(Protocol):
    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Streams(Protocol):
    """Two queues of one device: steps are computed on one, adapters copied on the other."""

    def copying(self) -> AbstractContextManager[None]:
        """What is enqueued inside goes to the copies' stream."""
        ...

    def copies_wait(self) -> None:
        """What follows on the copies' stream waits for what has been enqueued to compute."""
        ...

    def compute_waits(self) -> None:
        """And the other way round."""
        ...

    def record(self) -> Event:
        """An event behind what has been enqueued to copy."""
        ...


class CudaStreams:
    """Implements `Streams`. Steps run on whatever stream is the engine thread's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._compute: Any = None

    @contextmanager
    def copying(self) -> Iterator[None]:
        self._compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            yield

    def copies_wait(self) -> None:
        self._copies.wait_stream(self._compute)

    def compute_waits(self) -> None:
        self._compute.wait_stream(self._copies)

    def record(self) -> Event:
        return cast(Event, self._copies.record_event())
