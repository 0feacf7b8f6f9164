"""`onebase data check FILE`: what a training file holds, before anyone trains on it. Writes nothing; no torch."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from onebase.base_fetch import find_base
from onebase.home import Home
from onebase.tokenizer import TextTokenizer
from onebase_training.config import Recipe
from onebase_training.dataset import usable_rows
from onebase_training.file_report import FileReport
from onebase_training.rows import Encoder, Row, make_renderer

_BARS = 12
_SHOWN_PROBLEMS = 20


@dataclass(slots=True)
class DataReport:
    """Of one file. `duplicates` are records whose tokens another one has too. Nothing of a row is kept but its length,
    except for the few that are shown."""

    file: FileReport
    duplicates: int = 0
    learnt: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    shown: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.file.problems and bool(self.lengths)

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.file.path,
            "records": self.file.records,
            "usable": len(self.lengths),
            "broken": self.file.broken,
            "duplicates": self.duplicates,
            "left_out": dict(self.file.left_out),
            "problems": [{"line": problem.line, "message": problem.text} for problem in self.file.problems],
            "odd": [{"message": text, "count": o.count, "lines": o.lines} for text, o in self.file.odd.items()],
            "tokens": sum(self.lengths),
            "learnt_tokens": self.learnt,
            "longest": max(self.lengths, default=0),
        }


def tools(recipe: Recipe, home: Home) -> tuple[TextTokenizer, Encoder, int]:
    """The tokenizer and encoder of the recipe's base, and the longest row that it takes."""
    spec = find_base(home, recipe.base)
    tokenizer = TextTokenizer.load(spec.path)
    encoder = Encoder(tokenizer, make_renderer(recipe, spec, tokenizer))
    return tokenizer, encoder, min(recipe.data.max_tokens or 2048, spec.context_length)


def check_file(
    recipe: Recipe, encoder: Encoder, limit: int, examples: int = 1, told: Callable[[str], None] = lambda _: None
) -> DataReport:
    """Read the recipe's first training file to its end, and keep the first `examples` rows; `told` hears progress."""
    source = recipe.data.train[0]
    report = DataReport(FileReport(source.path, told))
    seen: set[bytes] = set()
    for row in usable_rows(source, recipe.folder, recipe.data, encoder, limit, report.file):
        key = row.key
        report.duplicates += key in seen
        seen.add(key)
        report.learnt += row.supervised
        report.lengths.append(len(row))
        if len(report.shown) < examples:
            report.shown.append(row)
    return report


def show(report: DataReport, console: Console, tokenizer: TextTokenizer) -> None:
    """Counts, problems, a histogram, and some rows as coloured tokens."""
    told = report.as_json()
    console.print(
        f"[bold]{escape(told['path'])}[/]: {told['records']} records, {told['usable']} usable, "
        f"{told['duplicates']} duplicates; {told['tokens']:,} tokens, {told['learnt_tokens']:,} of them learnt, "
        f"longest row {told['longest']}"
    )
    for reason, count in report.file.left_out.items():
        console.print(f"[yellow]{count} {reason}[/]")
    for problem in report.file.problems[:_SHOWN_PROBLEMS]:
        console.print(Text(str(problem), "red"))
    if report.file.broken > _SHOWN_PROBLEMS:
        console.print(f"[red]and {report.file.broken - _SHOWN_PROBLEMS} more[/]")
    for text, odd in report.file.odd.items():
        more = ", ..." if odd.count > len(odd.lines) else ""
        lines = ", ".join(map(str, odd.lines))
        console.print(f"[yellow]{odd.count} {text}[/]: line {lines}{more}", highlight=False)
    if report.lengths:
        for line in histogram(report.lengths):
            console.print(line, highlight=False)
    for row in report.shown:
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
