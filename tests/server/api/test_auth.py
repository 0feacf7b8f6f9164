"""Keys: who gets in, in what order things are refused, and what a key may not do."""

from typing import Any

import pytest

from api_world import LOOPBACK, World, chat_body, error_of, with_settings

API, OTHER, ADMIN = "sk-inference-1", "sk-inference-2", "sk-admin-key-1"
ELSEWHERE = ("203.0.113.9", 4711)


@pytest.fixture(scope="module")
def shared_keyed(shared_world: World) -> World:
    return with_settings(shared_world, api_keys=(API, OTHER), admin_key=ADMIN)


@pytest.fixture
def keyed(shared_keyed: World) -> World:
    shared_keyed.client = LOOPBACK
    return shared_keyed


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", [API, OTHER, ADMIN])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_any_key_may_chat_and_list(keyed: World, key: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {key}"}
    assert keyed.post("/v1/chat/completions", chat_body(), headers=headers).status_code == 200
    assert keyed.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "You didn't provide an API key"),
        ({"Authorization": ""}, "You didn't provide an API key"),
        ({"Authorization": "Bearer "}, "You didn't provide an API key"),
        ({"Authorization": f"Basic {API}"}, "You didn't provide an API key"),
        ({"Authorization": API}, "You didn't provide an API key"),
        (bearer("sk-wrong"), "Incorrect API key provided"),
        (bearer(API + "x"), "Incorrect API key provided"),
        (bearer(API[:-1]), "Incorrect API key provided"),
        (bearer(API.upper()), "Incorrect API key provided"),
        (bearer("sk-inferençe"), "Incorrect API key provided"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/models", "/admin/adapters"])
def test_without_a_good_key_it_is_401(keyed: World, headers: dict[str, str], words: str, path: str) -> None:
    sent = {name: value.encode() for name, value in headers.items()}
    reply = keyed.get(path, headers=sent)
    assert reply.status_code == 401
    error = error_of(reply)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert error["message"].startswith(words)
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"]


def test_a_key_is_not_shown_in_full(keyed: World) -> None:
    wrong = "sk-a-long-wrong-key-of-someone"
    assert wrong not in keyed.get("/v1/models", headers=bearer(wrong)).text


@pytest.mark.parametrize(
    "body",
    [
        {"content": b"{"},
        {"json": chat_body(temperature=9)},
        {"json": chat_body(model="nobody")},
        {"content": b"x" * 9_000_000},
    ],
    ids=["malformed", "invalid", "unknown model", "too large"],
)
def test_the_key_is_checked_before_anything_else(keyed: World, body: Any) -> None:
    assert keyed.request("POST", "/v1/chat/completions", headers=bearer("sk-wrong-key"), **body).status_code == 401


def test_an_inference_key_may_not_administer(keyed: World) -> None:
    for method, path in [("GET", "/admin/adapters"), ("POST", "/admin/retrain"), ("DELETE", "/v1/models/pirate")]:
        reply = keyed.request(method, path, headers=bearer(API))
        assert reply.status_code == 403
        assert error_of(reply)["code"] == "insufficient_permissions"


def test_the_admin_key_may(keyed: World) -> None:
    assert keyed.get("/admin/adapters", headers=bearer(ADMIN)).status_code == 200


def test_an_admin_key_holds_from_anywhere(keyed: World) -> None:
    keyed.client = ELSEWHERE
    assert keyed.get("/admin/adapters", headers=bearer(ADMIN)).status_code == 200
    assert keyed.get("/admin/adapters").status_code == 401


@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1"])
def test_without_an_admin_key_loopback_may_administer(world: World, client: str) -> None:
    near = with_settings(world)
    near.client = (client, 1)
    assert near.get("/admin/adapters").status_code == 200


@pytest.mark.parametrize("client", ["203.0.113.9", "192.168.1.2", "::2", "localhost.evil.org"])
def test_without_an_admin_key_others_may_not(world: World, client: str) -> None:
    far = with_settings(world, allow_no_keys=True)
    far.client = (client, 1)
    assert far.get("/admin/adapters").status_code == 403
    assert far.get("/v1/models").status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_needs_no_key(keyed: World, path: str) -> None:
    assert keyed.get(path).status_code == 200


METRICS = "sk-metrics-key"


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, {}, 200),
        ({}, {"Host": "evil.example"}, 401),
        ({"host": "0.0.0.0"}, {}, 401),
        ({"host": "0.0.0.0"}, bearer(API), 403),
        ({"host": "0.0.0.0"}, bearer(ADMIN), 200),
        ({"host": "0.0.0.0"}, bearer(METRICS), 401),
        ({"metrics_key": METRICS}, {}, 401),
        ({"metrics_key": METRICS, "host": "0.0.0.0"}, bearer(METRICS), 200),
        ({"metrics_key": METRICS}, bearer(METRICS + "x"), 401),
        ({"metrics_key": METRICS}, bearer(API), 403),
        ({"metrics_key": METRICS}, bearer(ADMIN), 200),
    ],
)
def test_who_may_read_the_metrics(keyed: World, settings: dict[str, str], headers: dict[str, str], status: int) -> None:
    assert with_settings(keyed, **settings).get("/metrics", headers=headers).status_code == status


def test_the_metrics_key_opens_nothing_else(keyed: World) -> None:
    server = with_settings(keyed, metrics_key=METRICS)
    for path in ("/v1/models", "/admin/adapters", "/v1/files"):
        assert server.get(path, headers=bearer(METRICS)).status_code == 401


def test_without_any_key_metrics_are_this_machines(world: World) -> None:
    server = with_settings(world, host="0.0.0.0", allow_no_keys=True)
    assert server.get("/metrics").status_code == 200
    server.client = ("203.0.113.9", 1)
    assert server.get("/metrics").status_code == 403


def test_metrics_hold_no_key_and_no_prompt(keyed: World) -> None:
    keyed.post(
        "/v1/chat/completions", chat_body(messages=[{"role": "user", "content": "my secret"}]), headers=bearer(API)
    )
    text = keyed.get("/metrics").text
    assert API not in text
    assert "my secret" not in text
    assert 'onebase_http_replies_total{method="POST",route="/v1/chat/completions",status="200"}' in text
    assert "onebase_generated_tokens_total" in text


def test_metrics_are_not_labelled_by_what_clients_send(keyed: World) -> None:
    keyed.get("/v1/models/whatever-somebody-sends", headers=bearer(API))
    keyed.get("/not/a/route/9")
    assert "whatever-somebody-sends" not in keyed.get("/metrics").text
    assert "/not/a/route" not in keyed.get("/metrics").text


def test_metrics_are_not_labelled_by_made_up_methods(keyed: World) -> None:
    for number in range(3):
        keyed.request(f"MADEUP{number}", "/healthz")
    assert "MADEUP" not in keyed.get("/metrics", headers=bearer(ADMIN)).text
    assert 'method="other"' in keyed.get("/metrics", headers=bearer(ADMIN)).text
