"""How many jobs may wait, in all and of one owner. What runs is bounded by the supervisor."""

from dataclasses import dataclass

from onebase.errors import Overloaded
from onebase_server.jobs.states import PAUSED, WAITING
from onebase_server.records.jobs import Count

RETRY_S = 60


@dataclass(frozen=True, slots=True)
class JobLimits:
    """`waiting`: jobs that may wait for their turn, over all owners. `waiting_of_owner`: of one, paused ones counted
    too, since they may come back at any time; None: no limit of its own."""

    waiting: int = 16
    waiting_of_owner: int | None = None

    async def check_room(self, owner: str, count: Count) -> None:
        """For one more job of the owner. Raises Overloaded."""
        waiting = await count(WAITING, None)
        if waiting >= self.waiting:
            raise Overloaded(f"{waiting} jobs wait already; try again when some have run.", retry_after_s=RETRY_S)
        most = self.waiting_of_owner
        if most is not None and await count((*WAITING, PAUSED), owner) >= most:
            raise Overloaded(
                f"{most} jobs of yours wait or are paused, the most that one key may have: cancel some, or try again "
                "when some have run.",
                retry_after_s=RETRY_S,
            )
