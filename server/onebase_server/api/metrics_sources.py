"""What the engine and the tables hold at the moment, as Prometheus metrics: read at a scrape, counted elsewhere."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import get_args

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from sqlalchemy.exc import SQLAlchemyError

from onebase.errors import OnebaseError
from onebase_server.api.deps import AppDeps
from onebase_server.api.metrics import Metrics
from onebase_server.engine.residence import AdapterStatus, Place
from onebase_server.engine.stats import Distribution, EngineStats
from onebase_server.jobs.states import RUNNING, State
from onebase_server.records.overview import Overview, read_overview

NEARNESS = {place: rank for rank, place in enumerate(Place)}


async def collect_metrics(deps: AppDeps) -> list[Metric]:
    """Everything that is not counted in `Metrics` itself. What can't be asked just now is left out."""
    found = [ready_metric(deps.backend.ready), tasks_metric(len(asyncio.all_tasks()))]
    backend = deps.backend.loaded
    if backend is not None:
        found += engine_metrics(backend.engine.stats())
        try:
            statuses = await asyncio.wrap_future(backend.engine.adapters())
        except OnebaseError:  # it has died or is going down, which the engine's own metrics say
            statuses = []
        found += residency_metrics(statuses, deps.metrics)
    try:
        overview = await read_overview(deps.durable.database, RUNNING)
    except (SQLAlchemyError, OSError):
        overview = None
    return [*found, *job_metrics(overview, get_args(State))]


def ready_metric(ready: bool) -> Metric:
    return GaugeMetricFamily("onebase_ready", "1 when the base is loaded and takes requests.", int(ready))


def tasks_metric(count: int) -> Metric:
    return GaugeMetricFamily("onebase_tasks", "Tasks of the event loop: two an open request, and a few besides.", count)


def engine_metrics(engine: EngineStats) -> Iterator[Metric]:
    gauges: list[tuple[str, str, float]] = [
        ("onebase_engine_healthy", "0 when the engine has died.", int(engine.is_healthy)),
        ("onebase_sequences_running", "Sequences in the batch.", engine.num_running),
        ("onebase_sequences_waiting", "Sequences that wait for their turn.", engine.num_waiting),
        ("onebase_sequences_queued", "Of them, those that never ran: what the queue bound counts.", engine.num_queued),
        ("onebase_kv_pages", "Pages of KV cache.", engine.pages_total),
        ("onebase_kv_pages_held", "Pages that running sequences hold.", engine.pages_held),
        ("onebase_kv_pages_cached", "Pages kept for the prefix cache only.", engine.pages_idle),
        ("onebase_adapter_host_bytes", "Adapter weights in host memory.", engine.host_bytes),
    ]
    counters: list[tuple[str, str, float]] = [
        ("onebase_preemptions", "Sequences that had to start again.", engine.num_preempted),
        ("onebase_kv_pages_evicted", "Cached pages given up for new ones.", engine.pages_evicted),
        ("onebase_steps", "Steps of the engine.", engine.num_steps),
        ("onebase_failed_steps", "Steps that failed.", engine.num_failed_steps),
        ("onebase_runner_seconds", "Time in the runner.", engine.runner_s),
        ("onebase_prompt_tokens", "Prompt tokens taken in.", engine.prompt_tokens),
        ("onebase_cached_tokens", "Of them, found in the prefix cache.", engine.cached_tokens),
        ("onebase_generated_tokens", "Tokens sampled.", engine.generated_tokens),
        ("onebase_adapter_loads", "Versions read from disk.", engine.num_loads),
        ("onebase_adapter_load_seconds", "Time in reading them.", engine.load_s),
    ]
    for name, about, value in gauges:
        yield GaugeMetricFamily(name, about, value)
    for name, about, value in counters:
        yield CounterMetricFamily(name, about, value)
    finished = CounterMetricFamily("onebase_sequences_finished", "Sequences by their end.", labels=["reason"])
    for reason, count in engine.finished.items():
        finished.add_metric([reason], count)
    yield finished
    yield histogram("onebase_step_seconds", "Time of a step.", engine.steps_s)
    yield histogram("onebase_step_sequences", "Sequences in a step.", engine.batch_sizes)
    yield histogram("onebase_engine_queue_seconds", "Submission to the first step.", engine.waits_s)


def histogram(name: str, about: str, values: Distribution) -> Metric:
    buckets: list[tuple[str, float]] = []
    running = 0
    for bound, count in zip((*values.bounds, float("inf")), values.counts, strict=True):
        running += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), running))
    return HistogramMetricFamily(name, about, buckets=buckets, sum_value=values.total)


def residency_metrics(statuses: Iterable[AdapterStatus], metrics: Metrics) -> Iterator[Metric]:
    """Only of the versions that have labels of their own: so few that nobody needs them together."""
    labels = ["adapter", "version"]
    place = GaugeMetricFamily("onebase_adapter_place", "0 disk, 1 loading, 2 host, 3 copying, 4 slot.", labels=labels)
    leases = GaugeMetricFamily("onebase_adapter_leases", "Sequences on the version.", labels=labels)
    hits = CounterMetricFamily("onebase_adapter_hits", "Leases of a version that was in memory.", labels=labels)
    misses = CounterMetricFamily("onebase_adapter_misses", "Leases that had to load it.", labels=labels)
    load_s = GaugeMetricFamily("onebase_adapter_last_load_seconds", "Disk to memory, last time.", labels=labels)
    for status in statuses:
        key = (status.ref.name, str(status.ref.version))
        if not metrics.knows(key):
            continue
        place.add_metric(key, NEARNESS[status.place])
        leases.add_metric(key, status.leases)
        hits.add_metric(key, status.hits)
        misses.add_metric(key, status.misses)
        if status.load_s is not None:
            load_s.add_metric(key, status.load_s)
    yield from (place, leases, hits, misses, load_s)


def job_metrics(overview: Overview | None, states: Sequence[str]) -> Iterator[Metric]:
    """None: the database did not answer."""
    yield GaugeMetricFamily("onebase_database_up", "0 when the database does not answer.", int(overview is not None))
    if overview is None:
        return
    jobs = GaugeMetricFamily("onebase_jobs", "Training jobs by state.", labels=["state"])
    for state in states:
        jobs.add_metric([state], overview.jobs.get(state, 0))
    yield jobs
    yield GaugeMetricFamily("onebase_file_bytes", "Bytes of all uploaded files.", overview.file_bytes)
    named = {
        name: GaugeMetricFamily(f"onebase_job_{name}", about, labels=["job", "adapter"])
        for name, about in (
            ("step", "Step of a running job."),
            ("steps", "All its steps."),
            ("loss", "Its last training loss."),
            ("tokens_per_second", "Its training speed."),
        )
    }
    for job in overview.running:
        values = {"step": job.step, "steps": job.total_steps, "loss": job.loss, "tokens_per_second": job.tokens_per_s}
        for name, value in values.items():
            if value is not None:
                named[name].add_metric([job.id, job.adapter], value)
    yield from named.values()
