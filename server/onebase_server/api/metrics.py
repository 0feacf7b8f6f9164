"""What this process does, for Prometheus. Labels are routes, statuses, and a bounded number of versions.

Numbers that change with every request are counted here; those that the engine and the tables hold are read when
somebody scrapes (`metrics_engine.py`).
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from litestar.types import Message, Scope
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from onebase_server.engine.types import AdapterRef

OTHER = ("other", "")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
"""A client may send any word for a method; all others share one label."""
IDLE_S = 300.0
"""A version that was quiet for so long gives its labels to one that is not."""
FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
VERSION = ("adapter", "version")
STARTED_KEY = "onebase_started"


class Metrics:
    """One app's. `top`: how many versions have labels of their own; the rest share `adapter="other"`."""

    def __init__(self, top: int = 50, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._top = top
        self._clock = clock
        self._seen: OrderedDict[tuple[str, str], float] = OrderedDict()
        counter, timer = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self.replies = counter("onebase_http_replies", "HTTP replies.", ("method", "route", "status"))
        self.reply_s = timer("onebase_http_seconds", "Request to first byte.", ("route",), buckets=FIRST_TOKEN_S)
        # reasons are error codes: a closed set
        self.refused = counter("onebase_refused", "Generations refused before they began.", ("reason",))
        self.requests = counter("onebase_requests", "Generations by their end.", (*VERSION, "outcome"))
        self.prompt_tokens = counter("onebase_version_prompt_tokens", "Prompt tokens.", VERSION)
        self.cached_tokens = counter("onebase_version_cached_tokens", "Of them, from the prefix cache.", VERSION)
        self.generated_tokens = counter("onebase_version_generated_tokens", "Generated tokens.", VERSION)
        self.first_token_s = timer(
            "onebase_time_to_first_token_seconds", "Submission to first token.", VERSION, buckets=FIRST_TOKEN_S
        )
        self.per_token_s = timer(
            "onebase_inter_token_seconds", "Between tokens of one choice.", VERSION, buckets=PER_TOKEN_S
        )
        self.queue_s = timer("onebase_queue_seconds", "Submission to first step.", VERSION, buckets=FIRST_TOKEN_S)
        self.request_s = timer("onebase_request_seconds", "Submission to last token.", VERSION, buckets=REQUEST_S)
        self._by_version = (
            self.prompt_tokens, self.cached_tokens, self.generated_tokens, self.first_token_s, self.per_token_s,
            self.queue_s, self.request_s,
        )  # fmt: skip

    async def count(self, message: Message, scope: Scope) -> None:
        """Litestar's before-send hook."""
        if message["type"] == "http.response.start":
            route = str(scope.get("path_template") or "unknown")
            method = str(scope.get("method", ""))
            self.replies.labels(method if method in METHODS else "other", route, str(message["status"])).inc()
            started = scope.get("state", {}).get(STARTED_KEY)
            if started is not None:
                self.reply_s.labels(route).observe(max(0.0, time.perf_counter() - started))

    def labels(self, adapter: AdapterRef | None) -> tuple[str, str]:
        """The labels of a version, `base` for none; those of `other` once there are too many."""
        wanted = ("base", "") if adapter is None else (adapter.name, str(adapter.version))
        now = self._clock()
        if wanted not in self._seen and len(self._seen) >= self._top:
            quiet, since = next(iter(self._seen.items()))
            if now - since < IDLE_S:
                return OTHER
            self._forget(quiet)
        self._seen[wanted] = now
        self._seen.move_to_end(wanted)
        return wanted

    def knows(self, labels: tuple[str, str]) -> bool:
        """Whether a version has labels of its own."""
        return labels in self._seen

    def _forget(self, labels: tuple[str, str]) -> None:
        del self._seen[labels]
        for metric in self._by_version:
            metric.remove(*labels)
        for outcome in ("stop", "length", "cancelled", "error"):
            self.requests.remove(*labels, outcome)

    def render(self, others: Iterable[Metric] = ()) -> bytes:
        """Prometheus's text form of these, and of `others` that somebody else counts."""
        return generate_latest(Page(self.registry.collect())) + generate_latest(Page(others))


class Page:
    """A collection as it is now, without the `_created` series that nobody asks for."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics:
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
