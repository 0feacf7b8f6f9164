"""Clients that leave, and clients that read slowly: over a real socket, since that is where they do it."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest

from api_world import BASE, chat_body
from fakes import EOS, FakeRunner
from live_server import Live, live_server
from stepping import SteppingRunner, wait_until


@pytest.fixture
def stepping(tmp_path: Any) -> Iterator[tuple[Live, SteppingRunner]]:
    runner = SteppingRunner()
    with live_server(tmp_path, runner=runner) as live:
        yield live, runner
        runner.let_go()


def connect(live: Live, body: dict[str, Any], buffer: int | None = None) -> socket.socket:
    """A chat request on a socket of its own, sent and not read."""
    address = urlparse(live.url)
    conn = socket.socket()
    if buffer is not None:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    conn.connect((address.hostname, address.port))
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(payload)}\r\n\r\n"
    conn.sendall(head.encode() + payload)
    return conn


def running(live: Live) -> int:
    stats = live.backend.engine.stats()
    return stats.num_running + stats.num_waiting


def cancelled(live: Live) -> int:
    return live.backend.engine.stats().finished["cancelled"]  # type: ignore[index]


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"stream": True, "n": 3}], ids=str)
def test_a_client_that_leaves_ends_its_generation_within_a_step(stepping: Any, fields: dict[str, Any]) -> None:
    live, runner = stepping
    conn = connect(live, chat_body(**fields))
    choices = fields.get("n", 1)
    runner.steps.release(3)
    wait_until(lambda: running(live) == choices and live.backend.engine.stats().generated_tokens >= 2)
    made = live.backend.engine.stats().generated_tokens
    conn.close()
    wait_until(lambda: not live.server.http.server_state.tasks)  # the server has seen it
    runner.steps.release(2)  # the step that ran, and at most one more
    wait_until(lambda: cancelled(live) == choices)
    assert live.backend.engine.stats().generated_tokens <= made + 3 * choices
    assert running(live) == 0


def test_a_client_that_leaves_while_it_waits_in_the_queue_is_forgotten(stepping: Any) -> None:
    live, runner = stepping
    first = connect(live, chat_body(stream=True))
    wait_until(lambda: running(live) == 1)
    second = connect(live, chat_body(stream=True))
    wait_until(lambda: live.backend.engine.stats().num_queued >= 1)
    second.close()
    wait_until(lambda: len(live.server.http.server_state.tasks) == 1)
    runner.steps.release(5)
    wait_until(lambda: cancelled(live) == 1)
    first.close()


def test_a_neighbour_is_left_alone_when_a_client_leaves(stepping: Any) -> None:
    live, runner = stepping
    stays = connect(live, chat_body(stream=True, max_tokens=20))
    wait_until(lambda: running(live) == 1)
    leaves = connect(live, chat_body(stream=True))
    wait_until(lambda: live.backend.engine.stats().num_queued >= 1)  # one that left before it came in is never run
    runner.steps.release(4)
    wait_until(lambda: live.backend.engine.stats().generated_tokens >= 4)
    leaves.close()
    wait_until(lambda: len(live.server.http.server_state.tasks) == 1)
    runner.let_go()
    with closing(stays), stays.makefile("rb") as file:
        text = read_to_done(file)
    said = [json.loads(line[6:])["choices"][0]["delta"] for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(delta.get("content", "") for delta in said) == "x" * 20
    wait_until(lambda: cancelled(live) == 1)


def read_to_done(file: Any) -> str:
    text = ""
    while "[DONE]" not in text:
        text += file.readline().decode()
    return text


def test_a_slow_reader_does_not_hold_the_others(tmp_path: Any) -> None:
    runner = FakeRunner(reply=lambda digest, prompt: [ord("x")] * 200 + [EOS])
    with live_server(tmp_path, runner=runner) as live:
        slow = connect(live, chat_body(stream=True, n=2, logprobs=True, top_logprobs=20), buffer=2048)
        reply = httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(), timeout=None)
        assert reply.json()["choices"][0]["message"]["content"] == "x" * 200
        wait_until(lambda: running(live) == 0)  # the slow one is generated too, nobody having read it
        with closing(slow), slow.makefile("rb") as file:
            assert read_to_done(file).count('"finish_reason":"stop"') == 2


def test_a_long_silence_is_filled_by_comments(tmp_path: Any) -> None:
    runner = SteppingRunner()
    with (
        live_server(tmp_path, runner=runner, settings={"ping_s": 0.02}) as live,
        closing(connect(live, chat_body(stream=True, max_tokens=2))) as conn,
        conn.makefile("rb") as file,
    ):
        line = b""
        while not line.startswith(b":"):
            line = file.readline()
        assert line == b": ping\n"
        runner.let_go()
        assert "[DONE]" in read_to_done(file)


def test_each_token_is_flushed_as_it_is_made(stepping: Any) -> None:
    live, runner = stepping
    with closing(connect(live, chat_body(stream=True, max_tokens=3))) as conn, conn.makefile("rb") as file:
        for _ in range(3):
            runner.steps.release()
            line = b""
            while b'"content":"x"' not in line:
                line = file.readline()


def test_a_shutdown_finishes_running_requests_and_refuses_new_ones(tmp_path: Any) -> None:
    runner = SteppingRunner()
    with live_server(tmp_path, runner=runner) as live:
        with closing(connect(live, chat_body(stream=True, max_tokens=5))) as conn, conn.makefile("rb") as file:
            runner.steps.release()
            wait_until(lambda: live.backend.engine.stats().generated_tokens >= 1)
            live.server.stop()
            late = httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(), timeout=None)
            assert late.status_code == 503
            assert late.headers["retry-after"]
            assert httpx.get(f"{live.url}/readyz", timeout=None).status_code == 503
            assert httpx.get(f"{live.url}/healthz", timeout=None).status_code == 200
            runner.let_go()
            assert read_to_done(file).count('"content"') >= 2
        assert not live.server.failed


def test_a_request_that_outlasts_the_drain_gets_an_error_event(tmp_path: Any) -> None:
    runner = SteppingRunner()
    with live_server(tmp_path, runner=runner, settings={"drain_s": 0.05}) as live:
        with closing(connect(live, chat_body(stream=True))) as conn, conn.makefile("rb") as file:
            runner.steps.release()
            wait_until(lambda: live.backend.engine.stats().generated_tokens >= 1)
            live.server.stop()
            wait_until(lambda: live.server.http.should_exit)  # its time is up
            step_for_ever = threading.Thread(target=release_until, args=(runner, lambda: live.server.ended.is_set()))
            step_for_ever.start()
            rest = file.read().decode()
        step_for_ever.join()
        assert "The server is shutting down" in rest
        assert "[DONE]" not in rest


def release_until(runner: SteppingRunner, ended: Callable[[], bool]) -> None:
    while not ended():
        runner.steps.release()
        time.sleep(0.005)


def test_before_the_base_is_loaded_it_is_alive_and_not_ready(tmp_path: Any) -> None:
    from live_server import load_fake

    go_on = threading.Event()

    def load_later(settings: Any, runner: FakeRunner) -> Any:
        port_known.set()
        go_on.wait()
        return load_fake(settings, runner)

    port_known = threading.Event()
    outcome: list[Any] = []

    def look() -> None:
        port_known.wait()
        url = lives[0].url
        outcome.append(httpx.get(f"{url}/healthz", timeout=None).status_code)
        outcome.append(httpx.get(f"{url}/readyz", timeout=None))
        outcome.append(httpx.get(f"{url}/v1/models", timeout=None).status_code)
        go_on.set()

    lives: list[Live] = []
    watcher = threading.Thread(target=look)
    with live_server(tmp_path, load_later, seen=lives, before_wait=watcher.start) as live:
        watcher.join()
        health, ready, models = outcome
        assert (health, ready.status_code, models) == (200, 503, 503)
        assert "still being loaded" in ready.json()["error"]["message"]
        assert httpx.get(f"{live.url}/readyz", timeout=None).json() == {"status": "ready"}
        assert httpx.get(f"{live.url}/v1/models", timeout=None).json()["data"][0]["id"] == BASE


def test_a_base_that_cannot_be_loaded_ends_the_server_with_words(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from onebase.errors import BaseModelError

    def fail(settings: Any, runner: FakeRunner) -> Any:
        raise BaseModelError("base tiny is damaged: fetch it again")

    with live_server(tmp_path, fail) as live:
        assert live.server.failed
    assert "base tiny is damaged: fetch it again" in caplog.text
