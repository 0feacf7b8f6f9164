"""Measurements as people and programs read them: a table, one JSON file, and what is kept of each version. No torch.

A version never changes once it is published, so its measurements are kept beside the store, a file a version
(`Home.evaluations`): measuring it again on the same conversations takes the older one's place.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from onebase.durable import replace_file
from onebase_training.eval_checks import Failure
from onebase_training.rows import Row


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model on one set of held-out conversations. Rates are 0..1; None where nothing could be generated."""

    model: str
    response_loss: float
    """Nats a learnt token."""
    token_accuracy: float
    stop_rate: float | None
    """Greedy answers that end by an end token within the limit."""
    exact_match: float | None
    checks: Mapping[str, float]
    examples: int
    tokens: int
    misses: Mapping[str, Sequence[str]]
    """Check that decides -> the beginnings of a few answers that do not pass it. Shown, and not kept: they may hold
    what the held-out conversations hold."""


def as_table(results: Sequence[Measurement], title: str | None = None) -> Table:
    """A row a model, a column a check that any of them has."""
    checks = list(dict.fromkeys(name for result in results for name in result.checks))
    if title is None:
        title = f"{results[0].examples} held-out conversations, {results[0].tokens} response tokens"
    table = Table(title=title)
    for column in ("model", "response loss", "token accuracy", "stops by eos", "exact match", *checks):
        is_model = column == "model"  # what tells the rows apart stays whole, however narrow the terminal
        table.add_column(column, justify="left" if is_model else "right", no_wrap=is_model, overflow="fold")
    for r in results:
        rates = [r.token_accuracy, r.stop_rate, r.exact_match, *(r.checks.get(name) for name in checks)]
        table.add_row(r.model, f"{r.response_loss:.4f}", *("-" if v is None else f"{v:.0%}" for v in rates))
    return table


def write_json(results: Sequence[Measurement], path: Path, failed: Sequence[Failure] = ()) -> None:
    """All models under `models`, and the last one's values at the top, which is what a gate reads."""
    content = {
        **asdict(results[-1]),
        "models": [asdict(result) for result in results],
        "failed": [asdict(failure) for failure in failed],
    }
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def keep(folder: Path, results: Sequence[Measurement], data: str, rows: Sequence[Row]) -> None:
    """Each version's measurement into its file. `data` says what `rows` are to a reader."""
    digest = hashlib.sha256(b"".join(row.key for row in rows)).hexdigest()[:16]
    told = {"data": data, "rows_digest": digest, "measured_at": int(time.time())}
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        others = [each for each in _read(folder, result.model) if each.get("rows_digest") != digest]
        content = [*others, {**told, **asdict(result), "misses": {}}]
        replace_file(folder / f"{result.model}.json", (json.dumps(content, indent=1) + "\n").encode())


def kept(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The reports of these adapters (`name`: all its versions; `name@3`), or of all: by version, then by time."""
    found = sorted(folder.glob("*.json"), key=lambda path: _order(path.stem))
    wanted = [path.stem for path in found if not names or {path.stem, path.stem.partition("@")[0]} & set(names)]
    return [report for model in wanted for report in sorted(_read(folder, model), key=lambda each: each["measured_at"])]


def kept_tables(reports: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each set of conversations: only what was measured on the same ones can be compared."""
    tables = []
    for digest in dict.fromkeys(report["rows_digest"] for report in reports):
        same = [report for report in reports if report["rows_digest"] == digest]
        results = [_measurement(report) for report in same]
        when = time.strftime("%Y-%m-%d", time.localtime(max(report["measured_at"] for report in same)))
        tables.append(as_table(results, f"{same[0]['data']}: {results[0].examples} conversations, last on {when}"))
    return tables


def _read(folder: Path, model: str) -> list[dict[str, Any]]:
    try:
        content = json.loads((folder / f"{model}.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _measurement(report: Mapping[str, Any]) -> Measurement:
    return Measurement(**{name: report[name] for name in Measurement.__dataclass_fields__})


def _order(model: str) -> tuple[str, int]:
    name, _, version = model.partition("@")
    return name, int(version) if version.isdecimal() else 0
