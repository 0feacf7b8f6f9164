"""How training makes way for requests: a policy's name, or the share of its time that training keeps while they run."""

from typing import Final

SHARES: Final = {"serve-first": 0.1, "fair": 0.5, "train-first": 1.0}
LEAST: Final = 0.01


def share_of(policy: str) -> float:
    """`policy` is one of `SHARES`, or the share itself, as "0.7". Raises ValueError with what may stand there."""
    if policy in SHARES:
        return SHARES[policy]
    try:
        share = float(policy)
    except ValueError:
        share = 0.0
    if not LEAST <= share <= 1:  # nor not-a-number
        raise ValueError(f"must be {', '.join(SHARES)}, or a share of its time from {LEAST} to 1, as 0.7")
    return share
