"""Prometheus's text form of what this process does. Labels are routes and statuses: bounded, no prompt, no key."""

from collections import Counter
from collections.abc import Iterable

from litestar.types import Message, Scope

from onebase_server.engine.stats import EngineStats


class HttpMetrics:
    """Replies by route and status. Counted on the event loop only."""

    def __init__(self) -> None:
        self.replies: Counter[tuple[str, str, int]] = Counter()

    async def count(self, message: Message, scope: Scope) -> None:
        """Litestar's before-send hook."""
        if message["type"] == "http.response.start":
            route = str(scope.get("path_template") or "unknown")
            self.replies[str(scope.get("method", "")), route, message["status"]] += 1


def render_metrics(http: HttpMetrics, engine: EngineStats | None, ready: bool) -> str:
    lines = list(
        _metric(
            "onebase_http_replies_total",
            "counter",
            "HTTP replies.",
            [
                (f'method="{method}",route="{route}",status="{status}"', count)
                for (method, route, status), count in sorted(http.replies.items())
            ],
        )
    )
    lines += _metric("onebase_ready", "gauge", "1 when the base is loaded.", [("", int(ready))])
    if engine is not None:
        lines += _engine_lines(engine)
    return "\n".join(lines) + "\n"


def _engine_lines(engine: EngineStats) -> list[str]:
    finished = [(f'reason="{reason}"', count) for reason, count in engine.finished.items()]
    simple = [
        ("onebase_sequences_running", "gauge", "Sequences in the batch.", engine.num_running),
        ("onebase_sequences_waiting", "gauge", "Sequences that wait for their turn.", engine.num_waiting),
        ("onebase_kv_pages_total", "gauge", "Pages of KV cache.", engine.pages_total),
        ("onebase_kv_pages_held", "gauge", "Pages that running sequences hold.", engine.pages_held),
        ("onebase_kv_pages_cached", "gauge", "Pages kept for the prefix cache only.", engine.pages_idle),
        ("onebase_preemptions_total", "counter", "Sequences that had to start again.", engine.num_preempted),
        ("onebase_adapter_host_bytes", "gauge", "Adapter weights in host memory.", engine.host_bytes),
        ("onebase_steps_total", "counter", "Steps of the engine.", engine.num_steps),
        ("onebase_failed_steps_total", "counter", "Steps that failed.", engine.num_failed_steps),
        ("onebase_step_seconds_total", "counter", "Time in steps.", engine.step_s),
        ("onebase_runner_seconds_total", "counter", "Of it, in the runner.", engine.runner_s),
        ("onebase_prompt_tokens_total", "counter", "Prompt tokens taken in.", engine.prompt_tokens),
        ("onebase_cached_tokens_total", "counter", "Of them, found in the prefix cache.", engine.cached_tokens),
        ("onebase_generated_tokens_total", "counter", "Tokens sampled.", engine.generated_tokens),
    ]
    lines = list(_metric("onebase_sequences_finished_total", "counter", "Sequences by their end.", finished))
    for name, kind, about, value in simple:
        lines += _metric(name, kind, about, [("", value)])
    return lines


def _metric(name: str, kind: str, about: str, values: Iterable[tuple[str, float]]) -> Iterable[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"
