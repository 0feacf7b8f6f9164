"""Versions move under 64 open streams: none fails, none is of two versions, none that begins later is of an old one."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from fakes import FakeRunner
from live_server import Live, live_server

pytestmark = pytest.mark.slow

STREAMS, SWAPS, ROUNDS = 64, 3, 1
SAYS = "Fifteen men on the dead man's chest, yo ho ho and a bottle of rum."


@dataclass
class Answer:
    """One stream: what the name meant at the latest when it began, and what came."""

    at_least: int
    text: str

    @property
    def version(self) -> int:
        head, _, rest = self.text.partition(" says: ")
        assert rest == SAYS, f"an answer of more than one version, or of half a one: {self.text!r}"
        return int(head.removeprefix("pirate@"))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    replies: dict[str, list[int]] = {}

    def reply(digest: str | None, prompt: tuple[int, ...]) -> list[int]:
        if digest not in replies:
            replies[str(digest)] = served.reply(digest)
        return replies[str(digest)]

    runner = FakeRunner(num_pages=4096, max_batch_sequences=STREAMS, max_batch_tokens=4 * STREAMS, reply=reply)
    with live_server(tmp_path_factory.mktemp("swap"), runner=runner) as served:
        served.says = SAYS
        for _ in range(SWAPS + 1):
            served.publish("pirate")
        yield served


class Crowd:
    """`STREAMS` clients, each with one stream after the other; `served` is the version published last."""

    def __init__(self, live: Live) -> None:
        self._http = httpx.AsyncClient(base_url=live.url, timeout=None, limits=httpx.Limits(max_connections=None))
        self.served = 1
        self.answers: list[Answer] = []
        self.swapping = True

    async def talk(self) -> None:
        begun = itertools.count()
        while self.swapping or next(begun) < ROUNDS:
            at_least = self.served
            self.answers.append(Answer(at_least, await self._stream()))

    async def _stream(self) -> str:
        body = {"model": "pirate", "messages": [{"role": "user", "content": "Sing"}], "stream": True}
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line)["choices"][0] for line in lines]
        assert chunks[-1]["finish_reason"] == "stop"
        return "".join(chunk["delta"].get("content") or "" for chunk in chunks)

    async def swap(self) -> None:
        for version in range(2, SWAPS + 2):
            await self._everyone_again()
            reply = await self._http.post("/admin/adapters/pirate/publish", json={"version": version})
            assert reply.status_code == 200, reply.text
            self.served = version
        self.swapping = False

    async def _everyone_again(self) -> None:
        """As many answers as there are streams, one of them of what is served now."""
        seen = len(self.answers)
        while len(self.answers) < seen + STREAMS or self.answers[-1].at_least < self.served:
            await asyncio.sleep(0)

    async def run(self) -> None:
        async with self._http:
            await self._http.post("/admin/adapters/pirate/publish", json={"version": 1})
            await asyncio.gather(self.swap(), *(self.talk() for _ in range(STREAMS)))


def test_versions_move_under_64_open_streams(live: Live, tmp_path: Path) -> None:
    crowd = Crowd(live)
    asyncio.run(crowd.run())
    versions = [answer.version for answer in crowd.answers]
    assert len(versions) >= STREAMS * SWAPS
    assert set(versions) == set(range(1, SWAPS + 2))
    assert [answer for answer in crowd.answers if answer.version < answer.at_least] == []
    assert len(live.runner.reads) == len(set(live.runner.reads)), "each version is read once"
