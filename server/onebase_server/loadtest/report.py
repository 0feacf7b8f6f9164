"""Turns measured requests into figures: percentiles, a JSON line, a table, a plot."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from onebase_server.loadtest.drive import Measured
from onebase_server.loadtest.workload import Workload

PERCENTILES = (50, 95, 99)


def percentiles(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """p50, p95, p99 and mean, in milliseconds unless scaled otherwise."""
    if not values:
        return {}
    found = {f"p{p}": round(float(np.percentile(values, p)) * scale, 2) for p in PERCENTILES}
    return {**found, "mean": round(float(np.mean(values)) * scale, 2)}


def summarize(results: list[Measured], wall_s: float, workload: Workload) -> dict[str, object]:
    """One JSON-able record: what was asked, what was seen. Requests that failed count in `errors` only."""
    good = [r for r in results if r.error is None]
    output_tokens = sum(r.completion_tokens for r in good)
    asked = {key: value for key, value in asdict(workload).items() if key != "models"}
    return {
        **asked,
        "models": len(workload.models),
        "completed": len(good),
        "errors": len(results) - len(good),
        "first_error": next((r.error for r in results if r.error), None),
        "wall_s": round(wall_s, 3),
        "requests_per_s": round(len(good) / wall_s, 3),
        "output_tokens_per_s": round(output_tokens / wall_s, 2),
        "prompt_tokens_mean": round(float(np.mean([r.prompt_tokens for r in good])), 1) if good else 0,
        "output_tokens_mean": round(output_tokens / len(good), 1) if good else 0,
        "cached_tokens_mean": round(float(np.mean([r.cached_tokens for r in good])), 1) if good else 0,
        "ttft_ms": percentiles([r.ttft_s for r in good if r.ttft_s is not None]),
        "inter_token_ms": percentiles([gap for r in good for gap in r.gaps_s]),
        "request_s": percentiles([r.finished_s for r in good if r.finished_s is not None], scale=1),
    }


def table(record: dict[str, object]) -> Table:
    shown = Table("figure", *(f"p{p}" for p in PERCENTILES), "mean", title="as the client saw it")
    for name in ("ttft_ms", "inter_token_ms", "request_s"):
        values = record[name]
        assert isinstance(values, dict)
        shown.add_row(name, *(str(values.get(key, "-")) for key in (*(f"p{p}" for p in PERCENTILES), "mean")))
    return shown


def plot(results: list[Measured], path: Path, title: str) -> None:
    """Time to first token over the run, and the distribution of inter-token latency, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    good = [r for r in results if r.ttft_s is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.scatter([r.started_s for r in good], [(r.ttft_s or 0) * 1e3 for r in good], s=12)
    left.set(xlabel="request started, s", ylabel="time to first token, ms", title=title)
    right.hist([gap * 1e3 for r in good for gap in r.gaps_s] or [0.0], bins=60)
    right.set(xlabel="inter-token latency, ms", ylabel="tokens")
    figure.savefig(path, dpi=110)
    plt.close(figure)
