"""Writes `dashboard.json` for Grafana from the rows below: `python docs/monitoring/make_dashboard.py`.

A panel is a title, a unit and its queries. tests/operations/ holds every metric that is named here to the server's own.
"""

import json
from pathlib import Path
from typing import Any

Query = tuple[str, str]
"""(PromQL, legend)"""

P50_P95 = (0.5, 0.95)


def quantiles(metric: str, by: str = "") -> list[Query]:
    group = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return [
        (
            f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket[$__rate_interval])))",
            f"p{q * 100:.0f}{legend}",
        )
        for q in P50_P95
    ]


def rate(metric: str, by: str) -> Query:
    return (
        f"sum by ({by}) (rate({metric}[$__rate_interval]))",
        " ".join(f"{{{{{each.strip()}}}}}" for each in by.split(",")),
    )


ROWS: list[tuple[str, list[tuple[str, str, list[Query]]]]] = [
    (
        "What clients see",
        [
            ("Requests", "reqps", [rate("onebase_http_replies_total", "route, status")]),
            ("Time to first token", "s", quantiles("onebase_time_to_first_token_seconds")),
            ("Between tokens", "s", quantiles("onebase_inter_token_seconds")),
            ("Refused", "reqps", [rate("onebase_refused_total", "reason")]),
        ],
    ),
    (
        "By adapter and version",
        [
            ("Generations", "reqps", [rate("onebase_requests_total", "adapter, version, outcome")]),
            ("Generated tokens", "short", [rate("onebase_version_generated_tokens_total", "adapter, version")]),
            ("First token, p95", "s", quantiles("onebase_time_to_first_token_seconds", "adapter")[1:]),
            ("Whole generation, p95", "s", quantiles("onebase_request_seconds", "adapter")[1:]),
            ("Place (0 disk, 2 host, 4 slot)", "short", [("onebase_adapter_place", "{{adapter}}@{{version}}")]),
            ("Prompt tokens from the prefix cache", "percentunit", [
                (
                    "sum by (adapter) (rate(onebase_version_cached_tokens_total[$__rate_interval])) / "
                    "sum by (adapter) (rate(onebase_version_prompt_tokens_total[$__rate_interval]))",
                    "{{adapter}}",
                )
            ]),
        ],
    ),
    (
        "Engine",
        [
            ("Running", "short", [("onebase_sequences_running", "sequences")]),
            ("Waiting", "short", [("onebase_sequences_waiting", "sequences")]),
            ("Step", "s", quantiles("onebase_step_seconds")),
            ("Batch size", "short", quantiles("onebase_step_sequences")),
            ("Queue wait", "s", quantiles("onebase_engine_queue_seconds")),
            ("KV pages", "short", [
                ("onebase_kv_pages_held", "held"),
                ("onebase_kv_pages_cached", "prefix cache"),
                ("onebase_kv_pages", "all"),
            ]),
            ("Tokens", "short", [
                ("rate(onebase_generated_tokens_total[$__rate_interval])", "generated"),
                ("rate(onebase_prompt_tokens_total[$__rate_interval])", "prompt"),
                ("rate(onebase_cached_tokens_total[$__rate_interval])", "cached"),
            ]),
            ("Adapter loads", "short", [("rate(onebase_adapter_loads_total[$__rate_interval])", "loads/s")]),
            ("Adapter memory", "bytes", [("onebase_adapter_host_bytes", "host")]),
        ],
    ),
    (
        "Training",
        [
            ("Jobs", "short", [("onebase_jobs", "{{state}}")]),
            ("Loss", "short", [("onebase_job_loss", "{{adapter}}")]),
            ("Tokens per second", "short", [("onebase_job_tokens_per_second", "{{adapter}}")]),
            ("Progress", "percentunit", [("onebase_job_step / onebase_job_steps", "{{adapter}}")]),
        ],
    ),
]  # fmt: skip


def build() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for row, contents in ROWS:
        panels.append({"type": "row", "title": row, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "panels": []})
        y += 1
        for index, (title, unit, queries) in enumerate(contents):
            x = index % 2 * 12
            panels.append(panel(title, unit, queries, {"x": x, "y": y, "w": 12, "h": 8}))
            y += 8 if x else 0
        y += 8 if len(contents) % 2 else 0
    for number, each in enumerate(panels, start=1):
        each["id"] = number
    return {
        "uid": "onebase",
        "title": "onebase",
        "tags": ["onebase"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": panels,
    }


def panel(title: str, unit: str, queries: list[Query], place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "onebase-prometheus"}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]}},
        "targets": [
            {"refId": chr(65 + index), "datasource": source, "expr": expr, "legendFormat": legend}
            for index, (expr, legend) in enumerate(queries)
        ],
    }


def text() -> str:
    return json.dumps(build(), indent=1) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "dashboard.json").write_text(text(), encoding="utf-8")
