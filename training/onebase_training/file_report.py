"""What became of a file's records: used, left out and why, broken and where, odd. No torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onebase.errors import DatasetError
from onebase_training.oddities import UNKNOWN_SPEAKER
from onebase_training.raw_record import Problem

_MAX_PROBLEMS = 1000
_SHOWN_LINES = 10


@dataclass(slots=True)
class Oddity:
    count: int = 0
    lines: list[int] = field(default_factory=list)
    """The first ten."""


@dataclass(slots=True)
class FileReport:
    path: str
    told: Callable[[str], None] = field(default=lambda _: None, repr=False, compare=False)
    """Hears every second how far the reading is: a large file takes minutes."""
    records: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> how many records."""
    problems: list[Problem] = field(default_factory=list)
    broken: int = 0
    """How many problems there are in all; `problems` holds the first thousand."""
    odd: dict[str, Oddity] = field(default_factory=dict)
    """What is odd about sound records -> how many, and where."""

    def note(self, problem: Problem) -> None:
        self.broken += 1
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)

    def note_oddity(self, text: str, line: int) -> None:
        odd = self.odd.setdefault(text, Oddity())
        odd.count += 1
        if len(odd.lines) < _SHOWN_LINES:
            odd.lines.append(line)

    @property
    def notices(self) -> list[str]:
        """What changed what is trained; of the oddities only a kept speaker did, of which the seed warned, too."""
        reasons = [*self.left_out.items()]
        if kept := self.odd.get(UNKNOWN_SPEAKER):
            reasons.append((f"{UNKNOWN_SPEAKER} (first on line {kept.lines[0]})", kept.count))
        return [f"{self.path}: {count} of {self.records} records {reason}" for reason, count in reasons]


def reasons(reports: Sequence[FileReport]) -> str:
    """Why nothing is left."""
    told = [f"{count} {reason}" for report in reports for reason, count in report.left_out.items()]
    return "; ".join(told) or "the file is empty"


def raise_problems(reports: Sequence[FileReport]) -> None:
    """Raises DatasetError when anything is broken. A file that is both trained on and held out is told once."""
    broken = list({report.path: report for report in reports if report.problems}.values())
    if not broken:
        return
    texts = [
        str(problem) if len(broken) == 1 else f"{report.path} {problem}"
        for report in broken
        for problem in report.problems
    ]
    raise DatasetError(broken[0].path, texts)
