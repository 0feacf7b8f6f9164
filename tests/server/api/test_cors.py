"""Pages of other origins may call only if the settings name them."""

import pytest

from api_world import World, chat_body, error_of, with_settings

PAGE = {"Origin": "https://app.example.org"}


@pytest.fixture(scope="module")
def open_to_a_page(shared_world: World) -> World:
    return with_settings(shared_world, cors_origins=("https://app.example.org",))


def test_a_named_origin_may_call_and_read_the_request_id(open_to_a_page: World) -> None:
    reply = open_to_a_page.post("/v1/chat/completions", chat_body(), headers=PAGE)
    assert reply.headers["access-control-allow-origin"] == PAGE["Origin"]
    assert "x-request-id" in reply.headers["access-control-expose-headers"]


def test_a_browser_may_ask_first(open_to_a_page: World) -> None:
    asks = {**PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    reply = open_to_a_page.request("OPTIONS", "/v1/chat/completions", headers=asks)
    assert reply.is_success
    assert reply.headers["access-control-allow-origin"] == PAGE["Origin"]


def test_a_browser_of_another_page_is_told_why_in_openai_s_words(open_to_a_page: World) -> None:
    asks = {"Origin": "https://evil.example.org", "Access-Control-Request-Method": "POST"}
    reply = open_to_a_page.request("OPTIONS", "/v1/chat/completions", headers=asks)
    assert reply.status_code == 400
    assert error_of(reply)["param"] == "Origin"
    assert "x-request-id" in reply.headers
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("stream", [False, True])
def test_others_get_no_leave(open_to_a_page: World, world: World, stream: bool) -> None:
    for server, origin in ((open_to_a_page, "https://evil.example.org"), (world, PAGE["Origin"])):
        reply = server.post("/v1/chat/completions", chat_body(stream=stream), headers={"Origin": origin})
        assert "access-control-allow-origin" not in reply.headers
