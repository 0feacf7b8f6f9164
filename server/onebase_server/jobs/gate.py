"""The gate before a retrained version takes over: candidate and current, measured alike, compared by stated margins.

Measuring is a process of the trainer's package (`evaluate`), which writes one JSON file; judging is here, on numbers
only.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onebase_server.jobs.orders import Gate

ROUNDING = 1e-9  # 0.9 - 0.85 is more than 0.05 by a rounding error


@dataclass(frozen=True, slots=True)
class Measured:
    """One version on the held-out conversations. `loss` in nats a response token, `stop_rate` in 0..1."""

    version: str
    loss: float
    stop_rate: float | None
    examples: int


@dataclass(frozen=True, slots=True)
class Verdict:
    passed: bool
    reason: str
    candidate: Measured
    current: Measured | None

    def report(self) -> dict[str, Any]:
        """As the job shows it. JSON has no word for a loss that is not finite."""
        values = asdict(self)
        for each in (values["candidate"], values["current"] or {}):
            each |= {name: None for name in ("loss", "stop_rate") if not is_number(each.get(name))}
        return values


def judge(gate: Gate, candidate: Measured, current: Measured | None) -> Verdict:
    """A first version has nothing to be worse than, nor has one after a version that has no figures; but it must have
    been measurable itself."""
    problems = []
    if not is_number(candidate.loss):
        problems.append(f"its response loss is {candidate.loss}")
    if candidate.stop_rate is not None and not is_number(candidate.stop_rate):
        problems.append(f"the share of its answers that end by themselves is {candidate.stop_rate}")
    if current is not None and not problems:
        if candidate.loss > current.loss + gate.max_loss_increase + ROUNDING:
            problems.append(
                f"its response loss {candidate.loss:.4f} is more than {gate.max_loss_increase} above the current "
                f"version's {current.loss:.4f}"
            )
        new, old = candidate.stop_rate, current.stop_rate
        if new is not None and old is not None and old - new > gate.max_stop_rate_drop + ROUNDING:
            problems.append(
                f"{new:.0%} of its answers end by themselves, more than {gate.max_stop_rate_drop:.0%} "
                f"below the current version's {old:.0%}"
            )
    if not problems:
        return Verdict(True, "the gate holds", candidate, current)
    kept = "nothing is served" if current is None else f"{current.version} stays"
    return Verdict(
        False, f"{candidate.version} was not published: {' and '.join(problems)}; {kept}", candidate, current
    )


def is_number(value: float | None) -> bool:
    """Comparisons with NaN are false, whichever way they are put: it would pass any margin."""
    return value is not None and math.isfinite(value)


def read_measured(path: Path) -> dict[str, Measured]:
    """What `evaluate` wrote, by version; nothing if it has not, or not wholly."""
    try:
        return {each["model"]: _measured(each) for each in json.loads(path.read_text("utf-8"))["models"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _measured(values: Mapping[str, Any]) -> Measured:
    stop_rate = values["stop_rate"]
    return Measured(
        version=str(values["model"]),
        loss=float(values["response_loss"]),
        stop_rate=None if stop_rate is None else float(stop_rate),
        examples=int(values["examples"]),
    )
