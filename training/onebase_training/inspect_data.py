"""`onebase data check FILE`: what a training file holds, before anyone trains on it. Writes nothing; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from onebase.base_fetch import find_base
from onebase.home import Home
from onebase.prompt import get_renderer
from onebase.tokenizer import TextTokenizer
from onebase_training.config import Recipe
from onebase_training.dataset import FileReport, usable_rows
from onebase_training.rows import Encoder, Row

_BARS = 12
_SHOWN_PROBLEMS = 20


@dataclass(slots=True)
class DataReport:
    """Of one file. `duplicates` are records whose tokens another one has too."""

    file: FileReport
    rows: list[Row]
    duplicates: int
    lengths: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.file.problems and bool(self.rows)

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.file.path,
            "records": self.file.records,
            "usable": len(self.rows),
            "duplicates": self.duplicates,
            "left_out": dict(self.file.left_out),
            "problems": [{"line": problem.line, "message": problem.text} for problem in self.file.problems],
            "tokens": sum(self.lengths),
            "learnt_tokens": sum(row.supervised for row in self.rows),
            "longest": max(self.lengths, default=0),
        }


def tools(recipe: Recipe, home: Home) -> tuple[TextTokenizer, Encoder, int]:
    """The tokenizer and encoder of the recipe's base, and the longest row that it takes."""
    spec = find_base(home, recipe.base)
    tokenizer = TextTokenizer.load(spec.path)
    encoder = Encoder(tokenizer, get_renderer("human_response", tokenizer))
    return tokenizer, encoder, min(recipe.data.max_tokens or 2048, spec.context_length)


def check_file(recipe: Recipe, encoder: Encoder, limit: int) -> DataReport:
    """Read the recipe's first training file to its end."""
    source = recipe.data.train[0]
    report = FileReport(source.path)
    rows = list(usable_rows(source, recipe.folder, recipe.data, encoder, limit, report))
    distinct = {row.key for row in rows}
    return DataReport(report, rows, len(rows) - len(distinct), [len(row) for row in rows])


def show(report: DataReport, console: Console, tokenizer: TextTokenizer, examples: int) -> None:
    """Counts, problems, a histogram, and some rows as coloured tokens."""
    told = report.as_json()
    console.print(
        f"[bold]{told['path']}[/]: {told['records']} records, {told['usable']} usable, "
        f"{told['duplicates']} duplicates; {told['tokens']:,} tokens, {told['learnt_tokens']:,} of them learnt, "
        f"longest row {told['longest']}"
    )
    for reason, count in report.file.left_out.items():
        console.print(f"[yellow]{count} {reason}[/]")
    for problem in report.file.problems[:_SHOWN_PROBLEMS]:
        console.print(f"[red]{problem}[/]", highlight=False, markup=True)
    if len(report.file.problems) > _SHOWN_PROBLEMS:
        console.print(f"[red]and {len(report.file.problems) - _SHOWN_PROBLEMS} more[/]")
    if report.lengths:
        for line in histogram(report.lengths):
            console.print(line, highlight=False)
    for row in report.rows[:examples]:
        console.print()
        console.print(coloured(row, tokenizer))


def histogram(lengths: Sequence[int]) -> list[str]:
    """One line a range of token counts."""
    counts, edges = np.histogram(lengths, bins=min(_BARS, len(set(lengths))))
    widest = max(1, int(counts.max()))
    return [
        f"{round(low):>6} - {round(high):<6} {'█' * round(40 * count / widest)} {count}"
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def coloured(row: Row, tokenizer: TextTokenizer) -> Text:
    """Learnt tokens green, the context grey, special tokens by name; token borders by turning the background."""
    text = Text()
    for place, (token, learnt) in enumerate(zip(row.ids.tolist(), row.learnt.tolist(), strict=True)):
        piece = tokenizer.token_bytes(token).decode("utf-8", "replace") or tokenizer.token_text(token)
        colour = "green" if learnt else "bright_black"
        text.append(piece, style=f"{colour} on grey11" if place % 2 else colour)
    return text
