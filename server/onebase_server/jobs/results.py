"""A job's result file: OpenAI's CSV, one line a step, from the metrics that the trainer wrote."""

import csv
import io
from collections.abc import Iterable

from onebase_server.jobs.progress import StepMetrics

# OpenAI's columns, and what may fill them: a validation file is always evaluated as a whole here.
COLUMNS = {
    "train_loss": ("train_loss",),
    "train_accuracy": ("train_mean_token_accuracy",),
    "valid_loss": ("valid_loss", "full_valid_loss"),
    "valid_mean_token_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
}


def results_csv(metrics: Iterable[StepMetrics]) -> bytes:
    """Steps in order; of a step that was trained again after a crash, the last word. Empty cells where not measured."""
    steps: dict[int, dict[str, float]] = {}
    for each in metrics:
        steps.setdefault(each.step, {}).update(each.values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *COLUMNS])
    for step, values in sorted(steps.items()):
        cells = [next((values[name] for name in names if name in values), None) for names in COLUMNS.values()]
        writer.writerow([step, *("" if cell is None else f"{cell:.5f}" for cell in cells)])
    return text.getvalue().encode()
