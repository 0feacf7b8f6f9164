"""Files -> the rows to train on and the rows held out, with a report of all that was left out. No torch.

Every broken record of every file is found before anything is said; then either all is well or DatasetError lists
them with their line numbers, and nothing has been written.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from onebase.errors import DatasetError, InvalidInput
from onebase_training.config import DataConfig, Recipe, Source
from onebase_training.file_report import FileReport, raise_problems, reasons
from onebase_training.oddities import oddities
from onebase_training.raw_record import Problem
from onebase_training.read import read_records
from onebase_training.record_parts import RecordError
from onebase_training.records import PlainText, Record, parse_record
from onebase_training.rows import Encoder, Row, cut_to_turns

_TOLD_EVERY_S = 1.0
_MOST_SPLIT_OFF = 1000
"""Rows: an evaluation takes a pass over all of them. A file that is given as held out is evaluated whole."""


@dataclass(slots=True)
class Dataset:
    """`train` holds (row, weight): weight is how often an epoch shows the row."""

    train: list[tuple[Row, float]]
    eval: list[Row]
    reports: list[FileReport]
    max_tokens: int

    @property
    def notices(self) -> list[str]:
        return [notice for report in self.reports for notice in report.notices]


def load_dataset(
    recipe: Recipe, encoder: Encoder, context_length: int, told: Callable[[str], None] = lambda _: None
) -> Dataset:
    """Read, render, cut, deduplicate and split. Raises DatasetError with every broken line; `told` hears progress."""
    config = recipe.data
    limit = min(config.max_tokens or 2048, context_length)
    learn_all = recipe.train.loss == "all"
    reports: list[FileReport] = []
    rows: dict[bytes, tuple[Row, float]] = {}
    for source in config.train:
        report = FileReport(source.path, told)
        reports.append(report)
        usable = usable_rows(source, recipe.folder, config, encoder, limit, report, learn_all=learn_all)
        for number, row in enumerate(usable):
            key = row.key if config.deduplicate else f"{len(reports)}/{number}".encode()
            if key in rows:
                report.left_out["left out as exact duplicates"] += 1
                continue
            rows[key] = (row, source.weight)
            report.used += 1
    given: list[tuple[Row, FileReport]] = []
    for source in config.eval:
        report = FileReport(source.path, told)
        reports.append(report)
        for row in usable_rows(source, recipe.folder, config, encoder, limit, report):
            given.append((row, report))
            report.used += 1
    raise_problems(reports)
    train = list(rows.values())
    if config.eval:
        if not given:
            raise DatasetError(config.eval[0].path, [f"no usable record to hold out ({reasons(reports)})"])
        held_out = _to_evaluate(given, train, config.max_eval_rows)
    else:
        train, held_out = _split(train, config.eval_fraction, config.max_eval_rows or _MOST_SPLIT_OFF)
    if not train:
        raise DatasetError(config.train[0].path, [f"no usable record ({reasons(reports)})"])
    if learn_all:
        train = [(row.all_learnt(), weight) for row, weight in train]
    return Dataset(train, held_out, reports, limit)


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
            report.note(Problem(line, error.message))
            continue
        if row.skipped:
            report.left_out["have answers that the chat template does not write as given: those are not learnt"] += 1
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
    told_at = monotonic()
    for number, raw in enumerate(read_records(source, folder, config), 1):
        if monotonic() - told_at >= _TOLD_EVERY_S:
            told_at = monotonic()
            report.told(f"{number:,} records read of {Path(source.path).name}")
        if isinstance(raw, Problem):
            report.records += raw.is_record
            report.note(raw)
            continue
        report.records += 1
        try:
            keep = config.unknown_role == "keep"
            record = parse_record(raw.value, source.format, keep_unknown_roles=keep)
        except (RecordError, InvalidInput) as error:
            report.note(Problem(raw.line, str(error)))
            continue
        for text in oddities(record):
            report.note_oddity(text, raw.line)
        yield raw.line, record


def _fit(row: Row, limit: int, config: DataConfig, report: FileReport, line: int, *, plain: bool) -> Row | None:
    """`plain`: a text without turns, which has no answer or eos to lose and so may end anywhere."""
    if len(row) <= limit:
        return row
    if config.too_long == "error":
        report.note(Problem(line, f"{len(row)} tokens, more than max_tokens = {limit}"))
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


def _split(rows: list[tuple[Row, float]], fraction: float, most: int) -> tuple[list[tuple[Row, float]], list[Row]]:
    """(to train on, held out). Held out is a row whose hash, as a number from 0 to 1, is below `fraction`.

    That is the row's own: it stays where it is when rows are added, taken away or put in another order, and equal
    rows are on one side. Of more than `most` the smallest hashes are held out and the others are trained on, so no
    row is lost and none that was trained on is held out once the file has grown. Ten rows, or rows whose share is more
    than half a row, hold out one at least; one row is always left to train on.
    """
    places = sorted(row.place for row, _ in rows)
    least = len(places) >= 10 or len(places) * fraction > 0.5
    below = bisect_left(places, int(fraction * 2**128).to_bytes(16, "big"))
    below = min(max(below, int(least)), most, len(places) - 1)
    if not fraction or below < 1:
        return rows, []
    border = places[below]
    if places[0] == border:  # copies of one row
        border = next((place for place in places if place > border), border)
    held_out = sorted((row for row, _ in rows if row.place < border), key=lambda row: row.place)
    return [pair for pair in rows if pair[0].place >= border], held_out


def _to_evaluate(given: list[tuple[Row, FileReport]], train: list[tuple[Row, float]], most: int | None) -> list[Row]:
    """The rows of the held-out files: all, or the `most` with the smallest hashes. What that means is told of each
    row's own file."""
    trained = {row.place for row, _ in train}
    for row, report in given:
        if row.place in trained:
            report.left_out["are trained on too, so their loss says little of new text"] += 1
    if most is None or len(given) <= most:
        return [row for row, _ in given]
    by_hash = sorted(given, key=lambda pair: pair[0].place)
    for _, report in by_hash[most:]:
        report.left_out[f"left out of evaluations: max_eval_rows = {most}"] += 1
    return [row for row, _ in by_hash[:most]]
