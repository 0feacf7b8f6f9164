"""What an operator sees: numbers by version within bounds, spans of a generation's steps, logs without text."""

import json
import logging
import re
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api_world import BASE, World, chat_body, settled_stats, with_settings
from onebase_server.api.caller import LOCAL, KeyLimits
from onebase_server.api.metrics import IDLE_S, OTHER, Metrics
from onebase_server.api.running import Generation, Names
from onebase_server.api.running import logger as generations
from onebase_server.api.tracing import OtelTracer, Trace, steps_of
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.types import AdapterRef, FinishReason, GenerationRequest, SamplingParams, TokenEvent, Usage
from onebase_server.logs import JsonFormatter, LineFormatter

SECRET = "the treasure is under the palm"
NAMES = Names("req_1", None, None)


def samples(world: World) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value of everything on /metrics, read by Prometheus's own parser."""
    found = {}
    for family in text_string_to_metric_families(world.get("/metrics").text):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def value(found: Any, name: str, **labels: str) -> float:
    return float(found.get((name, tuple(sorted(labels.items()))), 0.0))


def fresh(world: World, **settings: Any) -> World:
    """The same server with its counters at nought."""
    changed = replace(world, deps=replace(world.deps, metrics=Metrics(settings.pop("top", 50))))
    return with_settings(changed, **settings)


def test_a_generation_is_counted_by_its_version(world: World) -> None:
    server = fresh(world)
    server.chat(model="pirate@1")
    server.chat(model="pirate", stream=True)
    server.complete(max_tokens=3)
    found = samples(server)
    pirate = {"adapter": "pirate", "version": "1"}
    assert value(found, "onebase_requests_total", **pirate, outcome="stop") == 1
    assert value(found, "onebase_requests_total", adapter="pirate", version="2", outcome="stop") == 1
    assert value(found, "onebase_requests_total", adapter="base", version="", outcome="length") == 1
    assert value(found, "onebase_version_generated_tokens_total", adapter="base", version="") == 3
    answer = len("pirate@1 says: Hello there.") + 1
    assert value(found, "onebase_version_generated_tokens_total", **pirate) == answer
    assert value(found, "onebase_version_prompt_tokens_total", **pirate) > 0
    for name in ("onebase_time_to_first_token_seconds", "onebase_queue_seconds", "onebase_request_seconds"):
        assert value(found, f"{name}_count", **pirate) == 1
    assert value(found, "onebase_adapter_misses_total", **pirate) >= 1
    assert value(found, "onebase_adapter_place", **pirate) >= 2


def test_the_time_between_tokens_is_that_between_what_the_reader_gets(world: World) -> None:
    server = fresh(world)
    handle = RequestHandle(GenerationRequest("chatcmpl-1", (1, 2), SamplingParams(max_tokens=9)), lambda _: None)
    generation = Generation(handle, LOCAL, server.deps, NAMES)

    async def read() -> None:
        events = generation.events()
        for tokens in ((5,), (6, 7), (8,)):
            handle.push(TokenEvent(0, "x", tokens))
            await anext(events)
        handle.push(TokenEvent(0, "", (), (), FinishReason.STOP, Usage(2, 5)))
        assert [event.finish_reason async for event in events] == [FinishReason.STOP]

    server.loop.run_until_complete(read())
    generation.cancel()
    found = samples(server)
    base = {"adapter": "base", "version": ""}
    assert value(found, "onebase_inter_token_seconds_count", **base) == 2
    assert value(found, "onebase_version_generated_tokens_total", **base) == 5
    assert value(found, "onebase_requests_total", **base, outcome="stop") == 1, "closed once"


def test_a_generation_that_is_left_is_counted_as_cancelled_and_gives_its_place_back(world: World) -> None:
    server = fresh(world)
    caller = replace(LOCAL, limits=KeyLimits(parallel=1))
    server.deps.limiter.begin(caller, 1, 2)
    handle = RequestHandle(GenerationRequest("chatcmpl-1", (1, 2), SamplingParams(max_tokens=9), n=2), lambda _: None)
    generation = Generation(handle, caller, server.deps, NAMES)
    for _ in range(2):
        generation.cancel()
    assert server.deps.limiter.running(caller) == 0
    outcome = {"adapter": "base", "version": "", "outcome": "cancelled"}
    assert value(samples(server), "onebase_requests_total", **outcome) == 1


def test_the_engine_and_the_tables_are_told(world: World) -> None:
    settled_stats(world)  # a step that is not over has told half of its figures
    found = samples(fresh(world))
    assert value(found, "onebase_ready") == 1
    assert value(found, "onebase_engine_healthy") == 1
    assert value(found, "onebase_database_up") == 1
    assert value(found, "onebase_kv_pages") == 256
    assert value(found, "onebase_steps_total") == value(found, "onebase_step_seconds_count")
    assert value(found, "onebase_step_sequences_bucket", le="+Inf") == value(found, "onebase_step_sequences_count")
    assert ("onebase_jobs", (("state", "running"),)) in found


def test_what_is_refused_is_counted_by_reason(world: World) -> None:
    server = fresh(world, api_keys=("sk-inference-1",), key_tpm=1)
    headers = {"Authorization": "Bearer sk-inference-1"}
    for _ in range(3):
        server.post("/v1/chat/completions", chat_body(), headers=headers)
    assert value(samples(server), "onebase_refused_total", reason="rate_limit_exceeded") == 2


def test_a_crowd_of_versions_shares_one_label_and_a_quiet_one_gives_its_own_up() -> None:
    now = [0.0]
    metrics = Metrics(top=3, clock=lambda: now[0])

    def seen(name: str) -> tuple[str, str]:
        labels = metrics.labels(AdapterRef(name, 1, name, None))  # type: ignore[arg-type]
        metrics.prompt_tokens.labels(*labels).inc()
        return labels

    for number in range(100):
        seen(f"bot-{number}")
    text = metrics.render().decode()
    assert len(set(re.findall(r'adapter="([^"]*)"', text))) == 4
    assert 'onebase_version_prompt_tokens_total{adapter="other",version=""} 97.0' in text
    now[0] = IDLE_S
    seen("bot-0")
    seen("bot-2")
    assert seen("late") == ("late", "1")
    assert seen("bot-1") == OTHER
    assert 'adapter="bot-1"' not in metrics.render().decode()


def test_labels_hold_no_text_that_a_client_made_up(world: World) -> None:
    server = fresh(world)
    server.chat(model="made-up-by-a-client", messages=[{"role": "user", "content": SECRET}])
    server.chat(user="someones-name", messages=[{"role": "user", "content": SECRET}])
    text = server.get("/metrics").text
    for word in ("made-up-by-a-client", "someones-name", SECRET):
        assert word not in text


def test_a_log_line_tells_who_and_how_much_and_no_text(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        reply = world.chat(model="pirate", messages=[{"role": "user", "content": SECRET}])
    [record] = [record for record in caplog.records if record.name == generations.name]
    told = json.loads(JsonFormatter().format(record))
    assert told["request_id"] == reply.headers["x-request-id"]
    assert (told["adapter"], told["key"], told["outcome"]) == ("pirate@2", "local", "stop")
    assert told["generated_tokens"] > told["queue_s"] >= 0
    everything = caplog.text + "".join(JsonFormatter().format(each) for each in caplog.records)
    assert SECRET not in everything
    assert "says: Hello" not in everything


def test_a_line_break_in_what_is_logged_makes_no_second_line() -> None:
    record = logging.makeLogRecord({"msg": "bad name %r %s", "args": ("a", "x\n2026 ERROR forged"), "name": "n"})
    assert "\n" not in LineFormatter("%(name)s: %(message)s").format(record)
    assert "\n" not in JsonFormatter().format(record)


def trace(**changes: Any) -> Trace:
    whole = Trace("req_1", "local", "pirate@2", "stop", 1000.0, 0.5, 1.5, 4.0, 10, 20, None)
    return replace(whole, **changes)


def test_a_generations_steps_follow_one_another_as_far_as_it_got() -> None:
    assert steps_of(trace()) == [("queue", 0.0, 0.5), ("prefill", 0.5, 1.5), ("decode", 1.5, 4.0)]
    assert steps_of(trace(first_token_s=None)) == [("queue", 0.0, 0.5), ("prefill", 0.5, 4.0)]
    assert steps_of(trace(queue_s=None, first_token_s=None)) == [("queue", 0.0, 4.0)]


def test_spans_go_to_opentelemetry_below_the_callers_own(world: World) -> None:
    exporting = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = exporting.InMemorySpanExporter()
    tracer = OtelTracer(exporter)
    server = with_settings(replace(world, deps=replace(world.deps, tracer=tracer)))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    said = {"model": BASE, "messages": [{"role": "user", "content": SECRET}]}
    reply = server.post("/v1/chat/completions", said, headers={"traceparent": parent})
    tracer.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"generation", "queue", "prefill", "decode"}
    whole = spans["generation"]
    assert f"{whole.context.trace_id:032x}" == parent.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == parent.split("-")[2]
    assert whole.attributes["onebase.request_id"] == reply.headers["x-request-id"]
    assert whole.start_time <= spans["queue"].start_time <= spans["decode"].end_time <= whole.end_time
    assert SECRET not in str([span.to_json() for span in spans.values()])
