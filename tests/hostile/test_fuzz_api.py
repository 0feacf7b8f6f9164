"""Whatever is sent, the answer is OpenAI's error or a good reply: never a 500, never a word of our insides.

Bodies are made in two ways: any JSON at all, and good bodies with one place spoilt, which get further in.
"""

import copy
import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api_world import BASE, World, chat_body, error_of, settled_stats

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
FEW = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=EXAMPLES < 100
)
INSIDES = ("Traceback", "pydantic", "litestar", "sqlalchemy", "/onebase_server/", ".py", "object at 0x")

LINE = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"name": "n", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **chat_body(model="pirate", temperature=0.5, top_p=0.9, n=2, stop=["x"], seed=3, max_tokens=4),
        "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "tools": [TOOL], "tool_choice": "none",
        "stream": False, "metadata": {"a": "b"}, "response_format": {"type": "text"},
    },
    "/v1/completions": {"model": BASE, "prompt": ["Once", "Twice"], "max_tokens": 3, "logprobs": 1, "echo": True},
    "/v1/responses": {"model": BASE, "input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 3},
    "/v1/fine_tuning/jobs": {
        "model": BASE, "training_file": "file-none", "suffix": "s", "seed": 1, "metadata": {"a": "b"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    },
    "/v1/feedback": {"completion_id": "chatcmpl-none", "rating": "good", "comment": "c", "better_answer": "b"},
    "/admin/keys": {"name": "n", "scopes": ["inference"], "models": ["pirate"], "rpm": 1, "expires_in": 60, "x": 1},
    "/admin/retrain": {"adapter": "pirate", "dataset": "none.jsonl", "hyperparameters": {"epochs": 1}, "gate": True},
    "/admin/adapters/pirate/publish": {"weights": {"1": 0.5, "2": 0.5}},
    "/admin/adapters/pirate/rollback": {"version": 7},
    "/v1/chat/completions/chatcmpl-none": {"metadata": {"a": "b"}},
}  # fmt: skip

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["", "\x00", "\ud800", "🏴‍☠️", "a" * 5000, "../../etc/passwd", "<|im_end|>", "%s{0}${x}"])
    | st.sampled_from([10**400, -1, 1e308])
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


@st.composite
def spoilt(draw: st.DrawFn, body: dict[str, Any]) -> Any:
    """`body` with one value replaced, or a key added beside it."""
    value = draw(anything)
    place = draw(st.sampled_from(places(body)[1:]))
    changed = copy.deepcopy(body)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if draw(st.booleans()) or not isinstance(parent, dict):
        parent[place[-1]] = value
    else:
        parent[draw(st.text(max_size=8))] = value
    return changed


def check(world: World, path: str, content: bytes, headers: dict[str, str] | None = None) -> None:
    given_headers = {"Content-Type": "application/json", **world.headers, **(headers or {})}
    reply = world.request("POST", path, content=content, headers=given_headers)
    assert reply.status_code < 500, (content, reply.text)
    if reply.status_code >= 400:
        error_of(reply)
        assert not any(word in reply.text for word in INSIDES if word.encode() not in content), reply.text


def encode(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=True).encode()


@pytest.mark.parametrize("path", GOOD)
def test_any_json_is_answered(fuzzed: World, path: str) -> None:
    @FEW
    @given(body=anything)
    def send(body: Any) -> None:
        check(fuzzed, path, encode(body))

    send()


@pytest.mark.parametrize("path", GOOD)
def test_a_good_body_with_one_place_spoilt_is_answered(fuzzed: World, path: str) -> None:
    @FEW
    @given(body=spoilt(GOOD[path]))
    def send(body: Any) -> None:
        check(fuzzed, path, encode(body))

    send()


@FEW
@given(content=st.binary(max_size=200))
def test_any_bytes_are_answered(fuzzed: World, content: bytes) -> None:
    check(fuzzed, "/v1/chat/completions", content)


@pytest.mark.parametrize("deep", [b"[", b'{"a":', b'{"messages":['])
@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_json_is_refused(fuzzed: World, deep: bytes, depth: int) -> None:
    check(fuzzed, "/v1/chat/completions", deep * depth)
    close = b"]" if deep.endswith(b"[") else b"}"
    check(fuzzed, "/v1/chat/completions", deep * depth + b"1" + close * depth)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "pirate", "model": "x", "messages": []}',
        b'{"model": NaN}',
        b'{"temperature": 1e999999, "model": "pirate", "messages": [{"role": "user", "content": "x"}]}',
        b'{"seed": ' + b"9" * 5000 + b', "model": "pirate", "messages": [{"role": "user", "content": "x"}]}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}',
        b'{"model": "pirate", "messages": [{"role": "user", "content": "' + b"\\u0000" * 1000 + b'"}]}',
        b'{"a": ' * 3 + b"}" * 3,
    ],
    ids=lambda content: content[:40].decode("latin-1"),
)
def test_odd_json_is_answered(fuzzed: World, content: bytes) -> None:
    check(fuzzed, "/v1/chat/completions", content)


header_text = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60)


@FEW
@given(
    name=st.sampled_from(
        [
            "authorization",
            "idempotency-key",
            "content-type",
            "traceparent",
            "x-request-id",
            "origin",
            "accept",
            "cookie",
        ]
    ),
    text=header_text,
)
def test_any_header_is_answered(fuzzed: World, name: str, text: str) -> None:
    body = b'{"model": "pirate", "prompt": "x", "max_tokens": 1}'
    headers = {**fuzzed.headers, "content-type": "application/json", name: text.encode("latin-1")}
    reply = fuzzed.request("POST", "/v1/completions", content=body, headers=headers)
    assert reply.status_code < 500
    assert "\n" not in "".join(reply.headers.values())


@FEW
@given(path=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="?#"), max_size=60))
def test_any_path_is_answered(fuzzed: World, path: str) -> None:
    for prefix in ("/v1/models/", "/v1/files/", "/admin/adapters/", "/v1/fine_tuning/jobs/", "/"):
        reply = fuzzed.request("GET", httpx_path(prefix + path))
        assert reply.status_code < 500, (prefix, path, reply.text)
        if reply.status_code >= 400:
            error_of(reply)


def httpx_path(path: str) -> Any:
    from urllib.parse import quote

    return quote(path)


@FEW
@given(
    query=st.dictionaries(
        st.sampled_from(["after", "limit", "order", "purpose", "metadata", "metadata[a]", "stream", "x"]),
        st.text(max_size=20),
        max_size=4,
    )
)
def test_any_query_is_answered(fuzzed: World, query: dict[str, str]) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/chat/completions", "/v1/models"):
        reply = fuzzed.get(path, params={k: v.encode("utf-8", "replace").decode() for k, v in query.items()})
        assert reply.status_code < 500, (path, query, reply.text)


jsonl = st.lists(
    st.one_of(
        st.just(json.dumps(LINE).encode()),
        anything.map(encode),
        spoilt(LINE).map(encode),
        st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")),
    ),
    max_size=14,
).map(b"\n".join)


@FEW
@given(
    data=jsonl,
    name=st.sampled_from(["t.jsonl", "../../t.jsonl", "C:\\t.jsonl", "\u202etxt.jsonl", "a" * 600, "", "🏴.jsonl"]),
)
def test_any_upload_is_answered_and_leaves_nothing_when_refused(fuzzed: World, data: bytes, name: str) -> None:
    before = set(fuzzed.home.files.iterdir())
    reply = fuzzed.request("POST", "/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})
    assert reply.status_code in (200, 400), reply.text
    new = set(fuzzed.home.files.iterdir()) - before
    if reply.status_code == 400:
        error_of(reply)
        assert new == set()
        return
    assert [path.name for path in new] == [reply.json()["id"]]
    assert name.endswith(reply.json()["filename"]), "a drive and folders before it are left out"
    job = fuzzed.post("/v1/fine_tuning/jobs", {"model": BASE, "training_file": reply.json()["id"]})
    assert job.status_code in (200, 429), job.text


@FEW
@given(body=st.binary(max_size=300), boundary=st.sampled_from(["x", "-" * 200, "a b", 'q"q', ""]))
def test_any_multipart_body_is_answered(fuzzed: World, body: bytes, boundary: str) -> None:
    before = set(fuzzed.home.files.iterdir())
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'.encode()
    for content in (body, head + body, head + body + f"\r\n--{boundary}--\r\n".encode()):
        reply = fuzzed.request(
            "POST",
            "/v1/files",
            content=content,
            headers={**fuzzed.headers, "content-type": f"multipart/form-data; boundary={boundary}"},
        )
        assert reply.status_code == 400, reply.text
    assert set(fuzzed.home.files.iterdir()) == before


def test_after_all_that_the_server_serves_and_holds_nothing(fuzzed: World) -> None:
    assert fuzzed.chat(model="pirate").status_code == 200
    stats = settled_stats(fuzzed)
    assert (stats.num_running, stats.num_waiting, stats.num_queued, stats.pages_held) == (0, 0, 0, 0)
    assert stats.is_healthy
