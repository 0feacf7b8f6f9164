"""One error body on every path, whoever refuses: the body's bytes, the route, the method, the engine, a bug."""

import json
from typing import Any

import pytest
from litestar.exceptions import HTTPException

from api_world import World, chat_body, error_of, with_settings
from onebase import errors as domain
from onebase_server.api.errors import TABLE, answer_for

MALFORMED = {
    "nothing": b"",
    "half an object": b'{"model": "m"',
    "no JSON": b"hello",
    "a form": b"model=m&n=1",
    "an array": b"[1, 2]",
    "a string": b'"hi"',
    "null": b"null",
    "a number": b"3",
    "not UTF-8": b'{"model": "\xff"}',
    "a lone surrogate": b'{"model": "\\ud800"}',
    "UTF-16": '{"model": "m"}'.encode("utf-16"),
    "two objects": b"{}{}",
    "NaN": b'{"model": "m", "messages": [], "temperature": nan}',
    "deep arrays": b"[" * 30_000,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "deep in a field": b'{"model": "m", "messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "a huge number": b'{"model": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_body_is_400(world: World, path: str, body: bytes) -> None:
    reply = world.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"{", b"[]", b""], ids=["half", "array", "empty"])
def test_a_body_that_is_no_object_has_neither_code_nor_param(world: World, body: bytes) -> None:
    error = error_of(world.post("/v1/chat/completions", content=body))
    assert (error["code"], error["param"]) == (None, None)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json"},
        {"content-type": "Application/JSON; charset=utf-8"},
        {"content-type": "application/vnd.api+json"},
        {"content-type": ""},
        {},
        {"content-encoding": "identity"},
    ],
    ids=str,
)
def test_json_is_read_by_any_of_its_names(world: World, headers: dict[str, str]) -> None:
    body = json.dumps(chat_body()).encode()
    assert world.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"content-type": "text/plain"}, "'Content-Type: application/json'"),
        ({"content-type": "application/x-www-form-urlencoded"}, "'Content-Type: application/json'"),
        ({"content-type": "multipart/form-data; boundary=x"}, "'Content-Type: application/json'"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "'Content-Encoding'"),
        ({"content-encoding": "br, gzip"}, "'Content-Encoding'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/admin/keys"])
def test_what_is_no_json_or_compressed_is_415(world: World, path: str, headers: dict[str, str], words: str) -> None:
    reply = world.post(path, content=json.dumps(chat_body()).encode(), headers=headers)
    assert reply.status_code == 415
    error = error_of(reply)
    assert error["code"] == "unsupported_media_type"
    assert words in error["message"]
    assert reply.headers["accept-encoding"] == "identity"


def test_a_compressed_upload_is_415(world: World) -> None:
    upload = {"files": {"file": ("a.jsonl", b"x")}, "data": {"purpose": "fine-tune"}}
    reply = world.request("POST", "/v1/files", headers={"content-encoding": "gzip"}, **upload)
    assert (reply.status_code, error_of(reply)["code"]) == (415, "unsupported_media_type")


def test_of_two_fields_of_one_name_the_last_counts(world: World) -> None:
    body = json.dumps(chat_body()).encode()[:-1] + b', "model": "nobody"}'
    assert world.post("/v1/chat/completions", content=body).status_code == 404


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "/v1/models//"])
def test_a_slash_too_many_does_no_harm(world: World, path: str) -> None:
    assert world.get(path).json()["object"] == "list"
    refused = world.request("PATCH", path)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/pirate", "/healthz", "/readyz"])
def test_head_is_get_without_its_body(world: World, path: str) -> None:
    asked, got = world.request("HEAD", path), world.get(path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-length"] == got.headers["content-length"]
    assert world.request("HEAD", "/v1/nothing").status_code == 404
    assert world.request("HEAD", "/v1/completions").status_code == 405


def test_a_client_may_name_its_request(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "onebase_server.generations"):
        reply = world.post("/v1/chat/completions", chat_body(), headers={"X-Client-Request-Id": "mine-1"})
    [record] = [record for record in caplog.records if record.name == "onebase_server.generations"]
    assert vars(record)["client_request_id"] == "mine-1"
    assert vars(record)["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("name", ["x" * 513, "caf\xe9", "a\tb"], ids=["long", "no ASCII", "a tab"])
def test_a_client_s_name_that_can_not_be_logged_is_400(world: World, name: str) -> None:
    reply = world.get("/v1/models", headers={"X-Client-Request-Id": name.encode("latin-1")})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "X-Client-Request-Id")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/files/file-%00", "id"),
        ("/v1/fine_tuning/jobs/ftjob-%00/events", "id"),
        ("/v1/chat/completions/%00", "id"),
        ("/v1/models/a%00b", "id"),
        ("/admin/retrain/%00", "id"),
        ("/v1/files?after=%00", "after"),
        ("/v1/files?purpose=fine-tune%00", "purpose"),
        ("/v1/fine_tuning/jobs?metadata[a%00]=b", "metadata[a]"),
    ],
)
def test_a_nul_character_in_a_path_or_a_query_is_400_by_name(world: World, path: str, param: str) -> None:
    """PostgreSQL takes none, and would answer as a database that is away."""
    reply = world.get(path)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)


@pytest.mark.parametrize("field", ["training_file", "validation_file", "suffix"])
def test_a_nul_character_in_an_order_is_400_by_field(world: World, field: str) -> None:
    files = {"file": ("train.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n')}
    file_id = world.post("/v1/files", files=files, data={"purpose": "fine-tune"}).json()["id"]
    body = {"model": "tiny/base", "training_file": file_id, field: "a\x00b"}
    reply = world.post("/v1/fine_tuning/jobs", body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, field)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/chat", "/v2/models", "/admin/nothing"])
def test_an_unknown_path_is_404(world: World, path: str) -> None:
    reply = world.get(path)
    assert reply.status_code == 404
    assert error_of(reply)["type"] == "invalid_request_error"
    assert reply.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/chat/completions", "GET, HEAD, OPTIONS, POST"),
        ("DELETE", "/v1/chat/completions", "GET, HEAD, OPTIONS, POST"),
        ("PUT", "/v1/completions", "OPTIONS, POST"),
        ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
        ("POST", "/healthz", "GET, HEAD, OPTIONS"),
        ("PATCH", "/v1/models/pirate", "DELETE, GET, HEAD, OPTIONS"),
        ("PATCH", "/v1/models/ours/pirate", "DELETE, GET, HEAD, OPTIONS"),
    ],
)
def test_a_wrong_method_is_405_and_told_the_right_ones(world: World, method: str, path: str, allowed: str) -> None:
    reply = world.request(method, path)
    assert reply.status_code == 405
    assert error_of(reply)["code"] == "method_not_supported"
    assert reply.headers["allow"] == allowed
    assert world.request("OPTIONS", path).headers["allow"] == allowed


def test_a_body_beyond_the_limit_is_413(world: World) -> None:
    small = with_settings(world, max_body_mb=1)
    reply = small.chat(messages=[{"role": "user", "content": "x" * 1_100_000}])
    assert reply.status_code == 413
    assert error_of(reply)["code"] == "request_too_large"


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/nothing", "/v1/chat/completions"])
def test_every_reply_has_a_request_id_of_its_own(world: World, path: str) -> None:
    first, second = world.get(path), world.get(path)
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.headers["x-request-id"].startswith("req_")


def test_a_stream_has_a_request_id_too(world: World) -> None:
    assert world.chat(stream=True).headers["x-request-id"].startswith("req_")


def test_headers_that_sdks_add_are_tolerated(world: World) -> None:
    headers = {
        "OpenAI-Organization": "org-1",
        "OpenAI-Project": "proj_1",
        "X-Stainless-Lang": "python",
        "X-Stainless-Retry-Count": "0",
        "Idempotency-Key": "k",
        "Authorization": "Bearer anything",
    }
    assert world.post("/v1/chat/completions", chat_body(), headers=headers).status_code == 200


def test_an_unknown_model_is_404_with_near_names(world: World) -> None:
    reply = world.chat(model="pirat")
    error = error_of(reply)
    assert reply.status_code == 404
    assert error["code"] == "model_not_found"
    assert error["message"].startswith("The model `pirat` does not exist or you do not have access to it.")
    assert "pirate" in error["message"]


@pytest.mark.parametrize(
    "model",
    ["", " ", "PIRATE", "pirate ", "pirate@", "pirate@9", "pirate@0", "pirate@x", "../pirate", "tiny/Base", "ft:a:b"],
)
def test_only_an_exact_name_is_a_model(world: World, model: str) -> None:
    reply = world.chat(model=model)
    assert reply.status_code == 404, reply.text
    assert error_of(reply)["code"] == "model_not_found"


ALL_ERRORS: dict[str, tuple[Exception, int, str, str | None]] = {
    "input": (
        domain.InvalidInput("bad", param="x", code="invalid_value"),
        400,
        "invalid_request_error",
        "invalid_value",
    ),
    "overflow": (domain.ContextLengthExceeded(8, 9), 400, "invalid_request_error", "context_length_exceeded"),
    "adapter": (domain.AdapterInvalid("p", ["wrong shape"]), 400, "invalid_request_error", "invalid_adapter"),
    "no key": (domain.Unauthenticated("no"), 401, "invalid_request_error", "invalid_api_key"),
    "forbidden": (domain.Forbidden("no"), 403, "invalid_request_error", "insufficient_permissions"),
    "no model": (domain.ModelNotFound("m"), 404, "invalid_request_error", "model_not_found"),
    "no thing": (domain.NotFound("no"), 404, "invalid_request_error", None),
    "conflict": (domain.Conflict("no"), 409, "invalid_request_error", None),
    "limited": (domain.RateLimited("slow", retry_after_s=2.2), 429, "requests", "rate_limit_exceeded"),
    "full": (domain.Overloaded("full"), 429, "requests", "rate_limit_exceeded"),
    "not ready": (domain.NotReady("soon"), 503, "server_error", None),
    "base": (domain.BaseModelError("broken"), 503, "server_error", None),
    "engine": (domain.EngineError("died"), 500, "server_error", None),
    "bug": (RuntimeError("secret"), 500, "server_error", None),
    "http": (HTTPException("library words", status_code=415), 415, "invalid_request_error", "unsupported_media_type"),
}


@pytest.mark.parametrize(("error", "status", "kind", "code"), ALL_ERRORS.values(), ids=ALL_ERRORS)
def test_each_error_has_its_row(error: Exception, status: int, kind: str, code: str | None) -> None:
    answer = answer_for(error, request_id="req_1")
    detail = answer.body.error
    assert (answer.status, detail.type, detail.code) == (status, kind, code)
    assert "secret" not in detail.message
    assert "library" not in detail.message


def test_every_error_class_of_the_tree_has_a_row_or_a_parent_with_one() -> None:
    classes = [
        each for each in vars(domain).values() if isinstance(each, type) and issubclass(each, domain.OnebaseError)
    ]
    assert all(any(parent in TABLE for parent in each.__mro__) for each in classes)


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (2.2, "3")])
def test_a_limit_says_when_to_come_back(seconds: float, header: str) -> None:
    assert (
        answer_for(domain.RateLimited("slow", retry_after_s=seconds), request_id="r").headers["Retry-After"] == header
    )


def test_401_names_the_scheme() -> None:
    assert answer_for(domain.Unauthenticated("no"), request_id="r").headers["WWW-Authenticate"] == "Bearer"


def test_a_full_queue_is_429_before_anything_runs(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(request: Any) -> None:
        raise domain.Overloaded("5 requests are waiting already", retry_after_s=7)

    monkeypatch.setattr(own_world.deps.backend.get().engine, "submit", full)
    reply = own_world.chat(stream=True)
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "7"
    assert error_of(reply)["code"] == "rate_limit_exceeded"


def test_a_failed_step_is_500_without_its_words(own_world: World) -> None:
    own_world.runner.fail_next = RuntimeError("CUDA error at kernel.cu:7")
    reply = own_world.chat()
    assert reply.status_code == 500
    error = error_of(reply)
    assert error["type"] == "server_error"
    assert "kernel.cu" not in error["message"]


def test_a_broken_adapter_is_refused_and_the_others_serve(own_world: World) -> None:
    own_world.runner.broken.add(own_world.publish("broken").digest)
    assert error_of(own_world.chat(model="broken"))["code"] == "invalid_adapter"
    assert own_world.chat().status_code == 200


def test_an_error_after_the_first_byte_is_an_event_and_a_clean_end(own_world: World) -> None:
    own_world.runner.fail_next = RuntimeError("boom")
    reply = own_world.chat(stream=True)
    assert reply.status_code == 200
    blocks = reply.text.split("\n\n")
    assert blocks.pop() == ""
    last = json.loads(blocks[-1].removeprefix("data: "))
    assert list(last) == ["error"]
    assert last["error"]["type"] == "server_error"
    assert "[DONE]" not in reply.text
