"""What takes milliseconds to read is read off the event loop, so that nobody else's stream stands still for it."""

import threading
from typing import Any

import pytest

from api_world import BASE, World
from fakes import FakeTokenizer

LONG = "x" * 9000
SHORT = {"role": "user", "content": "x"}
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

READ_ASIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "one long message": (CHAT, {"messages": [{"role": "user", "content": LONG}]}),
    "one long part": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}),
    "as many messages as there may be": (CHAT, {"messages": [SHORT] * 4096}),
    "a long input": (RESPONSES, {"input": LONG}),
    "a long prompt": (TEXT, {"prompt": LONG}),
    "many prompts": (TEXT, {"prompt": ["x" * 100] * 128}),
}


def threads_that_read(world: World, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]) -> set[int]:
    threads: set[int] = set()
    encode = FakeTokenizer.encode

    def watch(self: FakeTokenizer, text: str, first: bool = False) -> list[int]:
        if "x" in text:  # no header has one
            threads.add(threading.get_ident())
        return encode(self, text, first)

    monkeypatch.setattr(FakeTokenizer, "encode", watch)
    world.post(path, {"model": BASE, **body})
    return threads


@pytest.mark.parametrize(("path", "body"), READ_ASIDE.values(), ids=READ_ASIDE)
def test_a_long_request_is_read_off_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    threads = threads_that_read(world, monkeypatch, path, body)
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": [SHORT]}), (TEXT, {"prompt": "x"})], ids=["chat", "text"]
)
def test_a_short_request_waits_for_no_thread(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    assert threads_that_read(world, monkeypatch, path, body) == {threading.get_ident()}
