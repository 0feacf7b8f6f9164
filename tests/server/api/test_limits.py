"""Limits of a key: by a clock of the test's own, told in OpenAI's headers, and given back when a request ends."""

import json
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest

from api_world import BASE, World, chat_body, error_of, with_settings
from fakes import FakeRunner
from live_server import live_server
from onebase.errors import Overloaded, RateLimited
from onebase_server.api.caller import Caller, KeyLimits
from onebase_server.api.limits import LIMIT_HEADERS, Limiter, spoken
from onebase_server.engine.runner import StepBatch, StepResult
from stepping import wait_until

API, OTHER = "sk-inference-1", "sk-inference-2"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def limited(world: World, **limits: int) -> tuple[World, Clock]:
    """The server with limits for both keys, and the limiter's clock."""
    clock = Clock()
    timed = replace(world, deps=replace(world.deps, limiter=Limiter(clock)))
    return with_settings(timed, api_keys=(API, OTHER), **limits), clock


def test_requests_a_minute_refill_evenly_and_are_told(world: World) -> None:
    server, clock = limited(world, key_rpm=2)
    for left in (1, 0):
        reply = server.post("/v1/chat/completions", chat_body(), headers=bearer(API))
        assert reply.status_code == 200
        assert reply.headers["x-ratelimit-limit-requests"] == "2"
        assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
    refused = server.post("/v1/chat/completions", chat_body(), headers=bearer(API))
    assert refused.status_code == 429
    assert (error_of(refused)["type"], error_of(refused)["code"]) == ("requests", "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
    clock.now = 30.0
    assert server.post("/v1/chat/completions", chat_body(), headers=bearer(API)).status_code == 200
    assert server.post("/v1/chat/completions", chat_body(), headers=bearer(API)).status_code == 429


def test_a_request_that_is_refused_for_its_rate_is_not_read(world: World) -> None:
    server, _ = limited(world, key_rpm=1)
    server.post("/v1/completions", {}, headers=bearer(API))
    assert server.post("/v1/completions", {}, headers=bearer(API)).status_code == 429


def test_reading_is_not_counted(world: World) -> None:
    server, _ = limited(world, key_rpm=1)
    for _ in range(5):
        assert server.get("/v1/models", headers=bearer(API)).status_code == 200


def test_one_keys_limit_is_not_anothers(world: World) -> None:
    server, _ = limited(world, key_rpm=1)
    assert server.post("/v1/chat/completions", chat_body(), headers=bearer(API)).status_code == 200
    assert server.post("/v1/chat/completions", chat_body(), headers=bearer(API)).status_code == 429
    assert server.post("/v1/chat/completions", chat_body(), headers=bearer(OTHER)).status_code == 200


def test_tokens_a_minute_count_prompt_and_answer(world: World) -> None:
    server, clock = limited(world, key_tpm=600)
    usage = server.post("/v1/chat/completions", chat_body(), headers=bearer(API)).json()["usage"]
    reply = server.get("/v1/models", headers=bearer(API))
    assert reply.headers["x-ratelimit-remaining-tokens"] == str(600 - usage["total_tokens"])
    long = {"model": "tiny/base", "prompt": "x" * 400, "max_tokens": 100}
    statuses = [server.post("/v1/completions", long, headers=bearer(API)).status_code for _ in range(2)]
    assert statuses == [200, 429]
    refused = server.post("/v1/completions", long, headers=bearer(API))
    assert error_of(refused)["type"] == "tokens"
    clock.now += int(refused.headers["retry-after"])
    assert server.post("/v1/completions", long, headers=bearer(API)).status_code == 200


def test_a_server_without_limits_sends_no_limit_headers(world: World) -> None:
    server, _ = limited(world)
    reply = server.post("/v1/chat/completions", chat_body(), headers=bearer(API))
    assert not set(LIMIT_HEADERS) & set(reply.headers)


def test_a_long_answer_leaves_a_debt_and_a_prompt_over_the_limit_runs_when_the_bucket_is_full() -> None:
    clock = Clock()
    limiter, caller = Limiter(clock), Caller("ann", "ann", "ann", limits=KeyLimits(tpm=60))
    limiter.begin(caller, 1, 100)
    limiter.end(caller, 1, generated=20)
    with pytest.raises(RateLimited) as refused:
        limiter.begin(caller, 1, 1)
    assert refused.value.retry_after_s == pytest.approx(61)
    clock.now = 61
    limiter.begin(caller, 1, 1)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", chat_body(n=3), "n"),
        ("/v1/completions", {"model": BASE, "prompt": ["a", "b", "c"]}, "prompt"),
        ("/v1/completions", {"model": BASE, "prompt": ["a", "b"], "n": 2}, "prompt"),
        ("/v1/completions", {"model": BASE, "prompt": "a", "best_of": 3}, "n"),
    ],
    ids=str,
)
def test_more_sequences_than_a_key_may_ever_have_is_no_429(world: World, path: str, body: Any, param: str) -> None:
    server, _ = limited(world, key_parallel=2)
    refused = server.post(path, body, headers=bearer(API))
    assert refused.status_code == 400
    assert (error_of(refused)["param"], error_of(refused)["code"]) == (param, "parallel_limit_exceeded")
    assert server.post(path, {**body, "max_tokens": 2}, headers=bearer(API)).status_code == 400
    assert server.post("/v1/chat/completions", chat_body(n=2), headers=bearer(API)).status_code == 200
    two = {"model": BASE, "prompt": ["a", "b"]}
    assert server.post("/v1/completions", two, headers=bearer(API)).status_code == 200
    assert server.deps.limiter._running == {}


def test_more_sequences_than_the_queue_ever_takes_is_no_429(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_world.deps.backend.get().engine.room, "most", 2)
    refused = own_world.post("/v1/chat/completions", chat_body(n=4))
    assert (refused.status_code, error_of(refused)["param"]) == (400, "n")
    prompts = {"model": BASE, "prompt": ["a", "b"], "n": 2}
    assert error_of(own_world.post("/v1/completions", prompts))["param"] == "prompt"
    assert own_world.post("/v1/chat/completions", chat_body(n=3)).status_code == 200, "an empty queue has one more"


def left(reply: httpx.Response) -> int:
    return int(reply.headers["x-ratelimit-remaining-tokens"])


def test_a_call_of_several_prompts_is_let_in_as_a_whole_and_prompts_count_once(world: World) -> None:
    server, clock = limited(world, key_tpm=100)
    body = {"model": BASE, "prompt": [[65] * 30, [66] * 30], "max_tokens": 1, "n": 2}
    assert left(server.post("/v1/completions", body, headers=bearer(API))) == 40 - 4
    refused = server.post("/v1/completions", body, headers=bearer(API))
    assert refused.status_code == 429
    assert left(refused) == 36, "nothing of a refused call is taken"
    assert server.deps.limiter._running == {}
    clock.now = 60.0
    body["prompt"] = [[65] * 60, [66] * 60]
    assert server.post("/v1/completions", body, headers=bearer(API)).status_code == 200, "as one large prompt would"


def test_what_the_engine_refuses_costs_no_tokens(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = limited(own_world, key_tpm=100)
    engine = server.deps.backend.get().engine
    submit, calls = engine.submit, iter([True, False])

    def full(request: Any) -> Any:
        if next(calls):
            return submit(request)
        raise Overloaded("full")

    monkeypatch.setattr(engine, "submit", full)
    body = {"model": BASE, "prompt": [[65] * 10, [66] * 30], "max_tokens": 1}
    refused = server.post("/v1/completions", body, headers=bearer(API))
    assert refused.status_code == 429
    assert left(refused) >= 90, "only the first prompt may have been computed meanwhile"
    assert server.deps.limiter._running == {}


def test_a_request_that_fails_before_it_runs_costs_no_tokens(own_world: World) -> None:
    server, _ = limited(own_world, key_tpm=100)
    own_world.runner.broken.add(own_world.publish("broken").digest)
    failed = server.post("/v1/chat/completions", chat_body(model="broken"), headers=bearer(API))
    assert failed.status_code >= 400
    assert left(server.get("/v1/models", headers=bearer(API))) == 100


def test_a_limit_that_is_lowered_or_raised_holds_at_once() -> None:
    clock = Clock()
    limiter, caller = Limiter(clock), Caller("ann", "ann", "ann", limits=KeyLimits(rpm=2))
    limiter.take_request(caller)
    limiter.take_request(replace(caller, limits=KeyLimits(rpm=4)))
    limiter.take_request(replace(caller, limits=KeyLimits(rpm=4)))
    with pytest.raises(RateLimited):
        limiter.take_request(replace(caller, limits=KeyLimits(rpm=2)))


def test_the_clock_of_the_machine_may_step_without_anyones_limit_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    limiter, caller = Limiter(), Caller("ann", "ann", "ann", limits=KeyLimits(rpm=1))
    limiter.take_request(caller)
    monkeypatch.setattr("time.time", lambda: 0.0)
    with pytest.raises(RateLimited):
        limiter.take_request(caller)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (6.5, "6.5s"), (59.9994, "59.999s"), (90, "1m30s")]
)
def test_spans_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert spoken(seconds) == text


class HeldRunner(FakeRunner):
    """Holds every step until the test lets go."""

    def __init__(self) -> None:
        super().__init__(reply=lambda digest, prompt: [ord("x")] * 50)
        self.free = threading.Event()

    def run(self, batch: StepBatch) -> StepResult:
        self.free.wait()
        return super().run(batch)


def test_generations_at_a_time_are_bounded_and_given_back_however_they_end(tmp_path: Any) -> None:
    runner = HeldRunner()
    settings = {"api_keys": (API,), "key_parallel": 1}
    with (
        live_server(tmp_path, runner=runner, settings=settings) as live,
        httpx.Client(base_url=live.url, headers=bearer(API), timeout=None) as http,
    ):
        with http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as first:
            assert first.status_code == 200
            refused = http.post("/v1/chat/completions", json=chat_body())
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert http.post("/v1/completions", json={"model": BASE, "prompt": ["a", "b"]}).status_code == 400
            assert http.post("/v1/chat/completions", json=chat_body(model="nobody")).status_code == 404
        runner.free.set()
        while http.post("/v1/chat/completions", json=chat_body()).status_code == 429:
            pass  # until the server has seen that the first one has left
        for body in (chat_body(), chat_body(), chat_body(stream=True)):
            assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert json.loads(http.post("/v1/completions", json={"model": "tiny/base", "prompt": "x"}).text)["choices"]


def test_keys_that_have_gone_quiet_leave_no_bucket_behind() -> None:
    now = 0.0
    limiter = Limiter(lambda: now)
    for index in range(5000):
        now += 1.0
        limiter.take_request(Caller("o", "o", f"key_{index}", limits=KeyLimits(rpm=60)))
    assert len(limiter._requests) <= 200
    spent = Caller("o", "o", "spent", limits=KeyLimits(rpm=1))
    limiter.take_request(spent)
    for index in range(3000):
        limiter.take_request(Caller("o", "o", f"other_{index}", limits=KeyLimits(rpm=60)))
    with pytest.raises(RateLimited):
        limiter.take_request(spent)


def test_a_request_cancelled_while_it_waits_gives_its_tokens_back(tmp_path: Any) -> None:
    runner = HeldRunner()
    settings = {"api_keys": (API,), "key_tpm": 1000}
    with (
        live_server(tmp_path, runner=runner, settings=settings) as live,
        httpx.Client(base_url=live.url, headers=bearer(API), timeout=None) as http,
    ):
        live.server.deps.limiter._clock = Clock()  # it stands: no bucket fills meanwhile
        with http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as first:
            before = left(first)
            wait_until(lambda: live.backend.engine.stats().num_running == 1)
            with http.stream(
                "POST", "/v1/completions", json={"model": BASE, "prompt": "x" * 200, "stream": True}
            ) as it:
                assert left(it) < before - 190
            wait_until(lambda: left(http.get("/v1/models")) == before)
        runner.free.set()
