"""How training makes way for requests: a policy's name, or the share of its time that training keeps while they run."""

from dataclasses import dataclass
from typing import Final

LEAST_SHARES: Final = {"serve-first": 0.1, "fair": 0.5, "train-first": 1.0}
LEAST: Final = 0.01
FULL_AT: Final = {"cpu": 1, "cuda": 20}
"""Sequences that run or wait, by the kind of device, from which on the least share holds. A step of one sequence takes
every core of a CPU; on a GPU a step of eight takes less than half as long again as a step of one."""


@dataclass(frozen=True, slots=True)
class TrainPolicy:
    """`least`: what training keeps of its time under any load. `takes_slack`: and what few requests leave."""

    least: float
    takes_slack: bool

    def share(self, sequences: int, device: str) -> float:
        """Of its time, what training keeps while so many `sequences` run or wait on `device`: all of it beside none."""
        if not sequences:
            return 1.0
        slack = 1 - (sequences / FULL_AT.get(device.partition(":")[0], 1)) ** 2 if self.takes_slack else 0.0
        return max(self.least, slack)


def policy_of(name: str) -> TrainPolicy:
    """`name` is one of `LEAST_SHARES`, or a share that stays the same under any load, as "0.7". Raises ValueError with
    what may stand there."""
    if name in LEAST_SHARES:
        return TrainPolicy(LEAST_SHARES[name], takes_slack=True)
    try:
        share = float(name)
    except ValueError:
        share = 0.0
    if not LEAST <= share <= 1:  # nor not-a-number
        raise ValueError(f"must be {', '.join(LEAST_SHARES)}, or a share of its time from {LEAST} to 1, as 0.7")
    return TrainPolicy(share, takes_slack=False)
