"""What only a real connection shows: raw HTTP against the real server, byte for byte as it goes over the wire."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlparse

import h11
import pytest

from api_world import chat_body
from live_server import Live, live_server
from stepping import wait_until

CHAT = "/v1/chat/completions"
JSON = "Content-Type: application/json"
BODY = json.dumps(chat_body()).encode()
PAGE = "https://app.example.org"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = {"cors_origins": (PAGE,), "max_connections": 20, "api_keys": ("sk-a-good-key",)}
    with live_server(tmp_path_factory.mktemp("edges"), settings=settings) as live:
        yield live


def connect(live: Live) -> socket.socket:
    address = urlparse(live.url)
    return socket.create_connection((str(address.hostname), int(address.port or 0)))


def head(method: str, path: str, *headers: str, body: bytes | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Authorization: Bearer sk-a-good-key", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json"
        return dict(json.loads(self.body)["error"])


def read_replies(conn: socket.socket, *methods: str) -> list[Reply]:
    """The answers to requests of these methods, in order, by a strict reader of HTTP."""
    client = h11.Connection(h11.CLIENT)
    replies = []
    for method in methods:
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
        client.send(h11.EndOfMessage())
        status, headers, body = 0, {}, b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                client.receive_data(conn.recv(65536))
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        replies.append(Reply(status, headers, body))
        if client.our_state is h11.DONE and client.their_state is h11.DONE:
            client.start_next_cycle()
    assert all(reply.headers["x-request-id"].startswith("req_") for reply in replies)
    return replies


def ask(live: Live, data: bytes, method: str = "POST") -> Reply:
    with closing(connect(live)) as conn:
        conn.sendall(data)
        return read_replies(conn, method)[0]


def test_pipelined_requests_are_answered_in_order_each_with_its_id(live: Live) -> None:
    asked = [
        head("GET", "/healthz"),
        head("GET", "/v1/nothing"),
        head("HEAD", "//v1/models"),
        head("POST", CHAT, JSON, body=BODY),
        head("POST", CHAT, JSON, body=b"{"),
        head("GET", "/readyz"),
    ]
    with closing(connect(live)) as conn:
        conn.sendall(b"".join(asked))
        replies = read_replies(conn, "GET", "GET", "HEAD", "POST", "POST", "GET")
    assert [reply.status for reply in replies] == [200, 404, 200, 200, 400, 200]
    assert replies[1].error["message"] == "Invalid URL (GET /v1/nothing)"
    assert replies[2].body == b""
    assert int(replies[2].headers["content-length"]) > 0
    assert len({reply.headers["x-request-id"] for reply in replies}) == 6


def test_a_body_in_chunks_is_a_body(live: Live) -> None:
    pieces = [BODY[start : start + 7] for start in range(0, len(BODY), 7)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    reply = ask(live, head("POST", CHAT, JSON, "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
    assert reply.status == 200


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(live: Live) -> None:
    with closing(connect(live)) as conn:
        conn.sendall(head("POST", CHAT, JSON, "Expect: 100-continue", f"Content-Length: {len(BODY)}"))
        assert conn.recv(65536).startswith(b"HTTP/1.1 100")
        conn.sendall(BODY)
        assert read_replies(conn, "POST")[0].status == 200


@pytest.mark.parametrize("header", ["Content-Length: 99999999", "Content-Encoding: gzip", "Content-Type: text/plain"])
def test_who_waits_for_leave_is_refused_before_the_body(live: Live, header: str) -> None:
    length = () if header.startswith("Content-Length") else (f"Content-Length: {len(BODY)}",)
    reply = ask(live, head("POST", CHAT, "Expect: 100-continue", header, *length))
    assert reply.status in (413, 415)


def test_what_is_no_http_is_answered_as_everything_else(live: Live) -> None:
    reply = ask(live, b"NONSENSE\r\n\r\n")
    assert (reply.status, reply.headers["connection"]) == (400, "close")
    assert reply.error["type"] == "invalid_request_error"


def test_bytes_that_are_no_utf8_are_400(live: Live) -> None:
    reply = ask(live, head("POST", CHAT, JSON, body=BODY.replace(b"Hi", b"H\xff")))
    assert reply.status == 400
    assert "parse the JSON body" in reply.error["message"]


def test_a_stream_has_its_id_in_its_head(live: Live) -> None:
    reply = ask(live, head("POST", CHAT, JSON, body=json.dumps(chat_body(stream=True)).encode()))
    assert reply.status == 200
    assert reply.body.endswith(b"data: [DONE]\n\n")


def test_a_browser_may_ask_for_leave_to_send_its_key(live: Live) -> None:
    """Without the key, which browsers leave out there."""
    asks = f"Origin: {PAGE}\r\nAccess-Control-Request-Method: POST\r\n"
    wants = "Access-Control-Request-Headers: authorization,content-type,x-stainless-lang,x-client-request-id\r\n"
    reply = ask(live, f"OPTIONS {CHAT} HTTP/1.1\r\nHost: x\r\n{asks}{wants}\r\n".encode(), "OPTIONS")
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == PAGE
    allowed = {name.strip().lower() for name in reply.headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "x-stainless-lang", "x-client-request-id"} <= allowed
    assert "POST" in reply.headers["access-control-allow-methods"]


def test_an_error_is_readable_for_a_page_too(live: Live) -> None:
    reply = ask(live, head("POST", CHAT, JSON, f"Origin: {PAGE}", body=b"{"))
    assert reply.status == 400
    assert reply.headers["access-control-allow-origin"] == PAGE


def test_more_connections_than_allowed_are_told_so_in_openais_body(live: Live) -> None:
    busy = [connect(live) for _ in range(25)]
    refused = []
    try:
        wait_until(lambda: len(live.server.http.server_state.connections) == 25)
        for conn in busy:
            conn.sendall(head("GET", "/v1/models"))
            refused += [reply for reply in read_replies(conn, "GET") if reply.status != 200]
    finally:
        for conn in busy:
            conn.close()
    assert len(refused) == 25 - 20
    assert {(reply.status, reply.error["type"]) for reply in refused} == {(503, "server_error")}
    assert refused[0].headers["retry-after"] == "1"
