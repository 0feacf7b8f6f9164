"""Files -> the rows to train on and the rows held out, with a report of all that was left out. No torch.

Every broken record of every file is found before anything is said; then either all is well or DatasetError lists
them with their line numbers, and nothing has been written.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from onebase.errors import DatasetError, InvalidInput
from onebase_training.config import DataConfig, Recipe, Source
from onebase_training.read import Problem, read_records
from onebase_training.records import PlainText, Record, RecordError, parse_record
from onebase_training.rows import Encoder, Row, cut_to_turns

_MAX_PROBLEMS = 1000


@dataclass(slots=True)
class FileReport:
    """What became of one file's records."""

    path: str
    records: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> how many records."""
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class Dataset:
    """`train` holds (row, weight): weight is how often an epoch shows the row."""

    train: list[tuple[Row, float]]
    eval: list[Row]
    reports: list[FileReport]
    max_tokens: int

    @property
    def notices(self) -> list[str]:
        return [
            f"{report.path}: {count} of {report.records} records {reason}"
            for report in self.reports
            for reason, count in report.left_out.items()
        ]


def load_dataset(
    recipe: Recipe, encoder: Encoder, context_length: int, alive: Callable[[], None] = lambda: None
) -> Dataset:
    """Read, render, cut, deduplicate and split; `alive` is called now and then. Raises DatasetError with every broken
    line."""
    config = recipe.data
    limit = min(config.max_tokens or 2048, context_length)
    learn_all = recipe.train.loss == "all"
    reports: list[FileReport] = []
    rows: dict[bytes, tuple[Row, float]] = {}
    for source in config.train:
        report = FileReport(source.path)
        reports.append(report)
        usable = usable_rows(source, recipe.folder, config, encoder, limit, report, learn_all=learn_all)
        for number, row in enumerate(usable):
            alive()
            key = row.key if config.deduplicate else f"{len(reports)}/{number}".encode()
            if key in rows:
                report.left_out["left out as exact duplicates"] += 1
                continue
            rows[key] = (row, source.weight)
            report.used += 1
    held_out: list[Row] = []
    for source in config.eval:
        report = FileReport(source.path)
        reports.append(report)
        held_out += usable_rows(source, recipe.folder, config, encoder, limit, report)
        report.used = len(held_out)
    _raise_problems(reports)
    train, split_off = _split(list(rows.values()), 0.0 if held_out else config.eval_fraction)
    if not train:
        reasons = "; ".join(f"{n} {reason}" for report in reports for reason, n in report.left_out.items())
        raise DatasetError(config.train[0].path, [f"no usable record ({reasons or 'the file is empty'})"])
    if learn_all:
        train = [(row.all_learnt(), weight) for row, weight in train]
    return Dataset(train, (held_out or split_off)[: config.max_eval_rows or 1000], reports, limit)


def usable_rows(
    source: Source,
    folder: Path,
    config: DataConfig,
    encoder: Encoder,
    limit: int,
    report: FileReport,
    *,
    learn_all: bool = False,
) -> Iterator[Row]:
    """Rows of at most `limit` tokens with something to learn; what is left out is counted in `report`."""
    for line, record in parsed_records(source, folder, config, report):
        try:
            row = encoder.encode(record)
        except InvalidInput as error:
            _note(report, Problem(line, error.message))
            continue
        fitted = _fit(row, limit, config, report, line, plain=isinstance(record, PlainText))
        if fitted is None:
            continue
        if not fitted.learnt.any() and not (learn_all and len(fitted) > 1):
            report.left_out["left out: nothing to learn in them"] += 1
            continue
        yield fitted


def parsed_records(
    source: Source, folder: Path, config: DataConfig, report: FileReport
) -> Iterator[tuple[int, Record]]:
    """(line, record) of every sound record; broken ones go into the report."""
    for raw in read_records(source, folder, config):
        report.records += 1
        if isinstance(raw, Problem):
            _note(report, raw)
            continue
        try:
            keep = config.unknown_role == "keep"
            yield raw.line, parse_record(raw.value, source.format, keep_unknown_roles=keep)
        except (RecordError, InvalidInput) as error:
            _note(report, Problem(raw.line, str(error)))


def _fit(row: Row, limit: int, config: DataConfig, report: FileReport, line: int, *, plain: bool) -> Row | None:
    """`plain`: a text without turns, which has no answer or eos to lose and so may end anywhere."""
    if len(row) <= limit:
        return row
    if config.too_long == "error":
        _note(report, Problem(line, f"{len(row)} tokens, more than max_tokens = {limit}"))
        return None
    if config.too_long == "drop":
        report.left_out[f"left out: longer than {limit} tokens"] += 1
        return None
    if config.too_long == "cut":
        report.left_out[f"cut at {limit} tokens, their last eos lost"] += 1
        return Row(row.ids[:limit], row.learnt[:limit])
    if plain:
        report.left_out[f"cut at {limit} tokens"] += 1
        return Row(row.ids[:limit], row.learnt[:limit])
    fitted = cut_to_turns(row, limit)
    if fitted is None:
        report.left_out[f"left out: not even one whole answer within {limit} tokens"] += 1
    else:
        report.left_out[f"cut to the turns that fit in {limit} tokens"] += 1
    return fitted


def _split(rows: list[tuple[Row, float]], fraction: float) -> tuple[list[tuple[Row, float]], list[Row]]:
    """The rows with the smallest hashes are held out: the same ones on every machine and in any order of files."""
    count = round(len(rows) * fraction)
    if fraction and not count and len(rows) >= 10:
        count = 1
    order = sorted(range(len(rows)), key=lambda index: rows[index][0].place)
    chosen = set(order[:count])
    train = [pair for index, pair in enumerate(rows) if index not in chosen]
    return train, [rows[index][0] for index in order[:count]]


def _note(report: FileReport, problem: Problem) -> None:
    if len(report.problems) < _MAX_PROBLEMS:
        report.problems.append(problem)


def _raise_problems(reports: list[FileReport]) -> None:
    broken = [report for report in reports if report.problems]
    if not broken:
        return
    texts = [
        str(problem) if len(broken) == 1 else f"{report.path} {problem}"
        for report in broken
        for problem in report.problems
    ]
    raise DatasetError(broken[0].path, texts)
