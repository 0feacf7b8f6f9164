"""Clients that send a byte now and then, or nothing, or too much: over real sockets, by a clock that the test moves."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import httpx
import pytest

from api_world import chat_body
from live_server import Live, live_server
from loop_clock import LoopClock
from onebase_server.api.caller import LOCAL

pytestmark = pytest.mark.slow
LIMIT_S = 20.0


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = {"slow_client_s": LIMIT_S, "max_body_mb": 1, "max_connections": 60}
    with live_server(tmp_path_factory.mktemp("slow"), settings=settings) as live:
        yield live


@pytest.fixture(scope="module")
def clock(live: Live) -> LoopClock:
    return LoopClock(live.server.http.servers[0].get_loop())


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def dribble(conn: socket.socket, byte: bytes, clock: LoopClock) -> bytes:
    """Send a byte at a time, far within the limit each, until the other side has had enough; what it said."""
    answer = bytearray()

    def read() -> None:
        try:
            while piece := conn.recv(65536):
                answer.extend(piece)
        except OSError:
            pass
        over.set()

    over = threading.Event()
    threading.Thread(target=read, daemon=True).start()
    while not over.is_set():
        try:
            conn.sendall(byte)
        except OSError:
            break
        clock.leap(LIMIT_S / 10)
    over.wait()
    return bytes(answer)


def test_a_head_that_never_ends_is_cut_though_bytes_keep_coming(live: Live, clock: LoopClock) -> None:
    with closing(connect(live)) as conn:
        conn.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        assert dribble(conn, b"a", clock) == b""


def test_a_connection_that_says_nothing_is_cut(live: Live, clock: LoopClock) -> None:
    with closing(connect(live)) as conn:
        assert dribble(conn, b"", clock) == b""


def say_healthz(conn: socket.socket) -> bytes:
    conn.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = b""
    while not answer.endswith(b'"ok"}') and (piece := conn.recv(65536)):
        answer += piece
    return answer


def test_a_connection_is_kept_between_requests_for_longer_than_clients_keep_theirs(
    live: Live, clock: LoopClock
) -> None:
    """httpx, and so OpenAI's client, drops one after 5 s: a server that does so too resets what is just being sent."""
    assert live.settings.keep_alive_s > 60 > LIMIT_S * 2 > 5
    with closing(connect(live)) as conn:
        assert say_healthz(conn)
        clock.leap(LIMIT_S * 2)
        assert say_healthz(conn)


def test_idle_connections_make_way_for_new_ones(live: Live) -> None:
    with contextlib.ExitStack() as crowd:
        for _ in range(200):
            conn = crowd.enter_context(closing(connect(live)))
            assert say_healthz(conn).startswith(b"HTTP/1.1 200")


def test_a_second_head_on_a_kept_connection_is_bounded_too(live: Live, clock: LoopClock) -> None:
    with closing(connect(live)) as conn:
        assert say_healthz(conn)
        conn.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        assert dribble(conn, b"a", clock) == b""


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files"])
def test_a_body_that_drips_is_answered_with_408_and_cut(live: Live, clock: LoopClock, path: str) -> None:
    kind = "multipart/form-data; boundary=x" if path == "/v1/files" else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 100000\r\n\r\n"
    with closing(connect(live)) as conn:
        conn.sendall(head.encode())
        answer = dribble(conn, b" ", clock)
    status, _, body = answer.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 408"), answer
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert b"connection: close" in status.lower()


def test_a_large_body_at_a_fair_rate_may_take_longer_than_the_limit(live: Live, clock: LoopClock) -> None:
    body = json.dumps(chat_body(user="x" * 60_000)).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            clock.leap(LIMIT_S / 4)
            yield body[start : start + 10_000]

    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    url = f"{live.url}/v1/chat/completions"
    assert httpx.post(url, content=pieces(), headers=headers, timeout=None).status_code == 200


def test_an_answer_may_take_longer_than_the_limit(live: Live, clock: LoopClock) -> None:
    """The limit is for what clients send: silence while a stream runs is no sin."""
    url = f"{live.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=chat_body(stream=True), timeout=None) as reply:
        clock.leap(LIMIT_S * 1.5)
        assert "[DONE]" in "".join(reply.iter_text())


LARGE = {"stream": True, "n": 16, "logprobs": True, "top_logprobs": 20, "max_tokens": 400}
"""Some 10 MB of events: far more than sockets and transports buffer."""


def ask_for_much(live: Live, **fields: object) -> socket.socket:
    live.says = "x" * 400
    body = json.dumps(chat_body(**{**LARGE, **fields})).encode()
    conn = socket.socket()
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    host, port = live.url.removeprefix("http://").split(":")
    conn.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    conn.sendall(head.encode() + body)
    return conn


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


@pytest.mark.parametrize("fields", [{}, {"stream": False}], ids=["stream", "whole"])
def test_a_client_that_reads_nothing_is_cut_and_holds_nothing(
    live: Live, clock: LoopClock, fields: dict[str, object]
) -> None:
    state, engine = live.server.http.server_state, live.backend.engine
    until(lambda: not state.tasks)
    made = engine.stats().generated_tokens
    with closing(ask_for_much(live, **fields)):
        until(lambda: engine.stats().generated_tokens > made)
        assert httpx.get(f"{live.url}/v1/models", timeout=None).status_code == 200, "nobody else waits for it"
        while state.tasks:  # though the client holds on to its end
            clock.leap(LIMIT_S / 10)
            time.sleep(0.01)
        until(lambda: (engine.stats().num_running, engine.stats().pages_held) == (0, 0))
        assert live.server.deps.limiter.running(LOCAL) == 0
        while state.connections:
            clock.leap(LIMIT_S / 10)
            time.sleep(0.01)


def test_a_client_that_reads_slowly_gets_all(live: Live, clock: LoopClock) -> None:
    text = b""
    with closing(ask_for_much(live, n=6)) as conn:
        while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            clock.leap(LIMIT_S / 8)
            piece = conn.recv(1 << 18)
            assert piece, "cut"
            text += piece
    assert text.count(b'"finish_reason":"length"') == 6


def test_a_huge_body_is_refused_before_it_is_read(live: Live) -> None:
    with closing(connect(live)) as conn:
        conn.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100000000000\r\n\r\n"
        )
        assert conn.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_huge_chunked_body_is_cut_at_the_limit(live: Live) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield b" " * 65536

    # the answer to a body that is still being sent may be lost to the reset that follows it
    with suppress(httpx.TransportError):
        assert httpx.post(f"{live.url}/v1/chat/completions", content=endless()).status_code == 413
    assert sent < 50_000_000
    assert httpx.get(f"{live.url}/healthz", timeout=None).status_code == 200


def test_more_connections_than_allowed_get_503_and_others_go_on_when_they_leave(live: Live) -> None:
    crowd = [connect(live) for _ in range(70)]
    try:
        until(lambda: len(live.server.http.server_state.connections) >= 70)
        statuses = set()
        for conn in crowd:
            conn.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            statuses.add(conn.recv(100)[9:12])
    finally:
        for conn in crowd:
            conn.close()
    assert statuses == {b"200", b"503"}
    while httpx.get(f"{live.url}/healthz", timeout=None).status_code != 200:
        time.sleep(0.01)
