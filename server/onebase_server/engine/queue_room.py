"""How many sequences may wait in an engine's queue, and how many of whom do. No lock: the engine's guards it."""

from collections.abc import Callable

from onebase.errors import Overloaded
from onebase_server.engine.types import GenerationRequest

KEPT_FOR_OTHERS = 16
"""One part in so many of the queue's bound is added for owners who have nothing in it."""


class QueueRoom:
    """A request takes its room when it enters the queue, and gives it back when its first step comes or it ends."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_queued = 0
        self.queued_of: dict[str | None, int] = {}
        """Of them, each owner's that has any."""

    @property
    def max_at_once(self) -> int:
        """Sequences that may enter together: there is no room for more even when the queue is empty."""
        return self.most + -(-self.most // KEPT_FOR_OTHERS)

    def check(self, request: GenerationRequest, retry_after_s: Callable[[], float]) -> None:
        """Raises Overloaded."""
        most = self.most if request.owner in self.queued_of else self.max_at_once
        if self.num_queued + request.n > most:
            raise Overloaded(
                f"{self.num_queued} requests are waiting, and this server queues {self.most}.",
                retry_after_s=retry_after_s(),
            )

    def take(self, request: GenerationRequest) -> None:
        self.num_queued += request.n
        self.queued_of[request.owner] = self.queued_of.get(request.owner, 0) + request.n

    def give_back(self, request: GenerationRequest) -> None:
        self.num_queued -= request.n
        left = self.queued_of[request.owner] - request.n
        if left:
            self.queued_of[request.owner] = left
        else:
            del self.queued_of[request.owner]
