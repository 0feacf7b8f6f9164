"""The key table is asked ahead of need: what was used, for a while, and no more than a few."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest

from live_server import live_server
from onebase.errors import NotReady
from onebase_server.api import fresh_keys
from onebase_server.api.fresh_keys import MAX_KEPT, FreshKeys
from onebase_server.api.keys import digest_of
from onebase_server.records.tables import KeyRow

SOON_S = 0.001


class Asked:
    """Remembers what was asked; `refuse` makes every answer a failure."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.refuse = False

    async def __call__(self, name: str) -> None:
        self.names.append(name)
        if self.refuse:
            raise NotReady("away", retry_after_s=1)


def opened(asked: Asked) -> FreshKeys:
    fresh = FreshKeys(asked, every_s=SOON_S)
    fresh.open()
    return fresh


async def until(reached: Callable[[], bool]) -> None:
    while not reached():
        await asyncio.sleep(SOON_S)


def test_what_was_used_is_asked_again_and_again_until_closed(loop: Any) -> None:
    async def scenario() -> None:
        asked = Asked()
        fresh = opened(asked)
        assert asked.names == []
        fresh.note("ann")
        await until(lambda: len(asked.names) >= 3)
        await fresh.close()
        count = len(asked.names)
        fresh.note("ann")
        await asyncio.sleep(5 * SOON_S)
        assert asked.names == ["ann"] * count

    loop.run_until_complete(scenario())


def test_only_the_keys_used_last_are_asked_for(loop: Any) -> None:
    async def scenario() -> None:
        asked = Asked()
        fresh = opened(asked)
        names = [f"key-{i}" for i in range(MAX_KEPT + 2)]
        for name in names:
            fresh.note(name)
        await until(lambda: len(asked.names) >= 2 * MAX_KEPT)
        await fresh.close()
        assert set(asked.names) == set(names[2:])

    loop.run_until_complete(scenario())


def test_a_key_that_nobody_uses_any_more_is_let_go(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        asked = Asked()
        fresh = opened(asked)
        fresh.note("ann")
        await until(lambda: len(asked.names) >= 1)
        monkeypatch.setattr(fresh_keys, "FOR_S", 0.0)
        await until(lambda: fresh._task is not None and fresh._task.done())
        count = len(asked.names)
        await asyncio.sleep(5 * SOON_S)
        assert len(asked.names) == count
        await fresh.close()

    loop.run_until_complete(scenario())


def test_a_table_that_is_away_is_asked_on(loop: Any) -> None:
    async def scenario() -> None:
        asked = Asked()
        asked.refuse = True
        fresh = opened(asked)
        fresh.note("ann")
        await until(lambda: len(asked.names) >= 2)
        assert set(asked.names) == {"ann"}
        await fresh.close()

    loop.run_until_complete(scenario())


def test_nothing_is_asked_before_it_is_opened(loop: Any) -> None:
    async def scenario() -> None:
        asked = Asked()
        fresh = FreshKeys(asked, every_s=SOON_S)
        fresh.note("ann")
        await asyncio.sleep(5 * SOON_S)
        assert asked.names == []
        await fresh.close()

    loop.run_until_complete(scenario())


def test_a_running_server_asks_for_the_key_that_was_used_and_ends_cleanly(tmp_path: Path) -> None:
    questions: SimpleQueue[str] = SimpleQueue()
    with live_server(tmp_path, settings={"admin_key": "sk-admin"}) as live:
        records = live.server.deps.keys
        by_hash = records.by_hash

        async def heard(digest: str) -> KeyRow | None:
            questions.put(digest)
            return await by_hash(digest)

        records.by_hash = heard  # type: ignore[method-assign]
        with httpx.Client(base_url=live.url, timeout=None) as http:
            admin = {"Authorization": "Bearer sk-admin"}
            key = http.post("/admin/keys", headers=admin, json={"name": "ann"}).json()["key"]
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert questions.get() == digest_of(key)  # the request's own
        assert questions.get() == digest_of(key)
