"""Streams of one adapter that never pause, from client processes of their own: the load of hot_swap_http.py."""

import argparse
import asyncio
import json
import multiprocessing
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

NAME = "captain"


@dataclass
class Stream:
    """Times by `time.perf_counter`. `version`: whose text it is; 0: nobody's. `asked_at`: when the publish was answered
    that it follows at once; 0: it follows none."""

    subject: str
    begun: float
    first: float = 0.0
    ended: float = 0.0
    asked_at: float = 0.0
    pieces: list[str] = field(default_factory=list)
    error: str = ""
    version: int = 0
    followed: int = 0
    """Characters that are that version's."""


class Clients:
    """Processes with a share of the streams each. `ended`: answers so far."""

    def __init__(self, url: str, options: argparse.Namespace, subjects: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.ended = context.Value("q", 0)
        self._over = context.Event()
        self._found = context.Queue()
        shares = [range(options.streams)[first :: options.clients] for first in range(options.clients)]
        self._processes = [
            context.Process(target=_client, args=(url, options, subjects, share, self.ended, self._over, self._found))
            for share in shares
        ]

    def __enter__(self) -> "Clients":
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            if error is not None:  # nobody reads what it would hand over
                process.terminate()
            process.join()

    def check(self) -> None:
        assert all(process.is_alive() for process in self._processes), "a client process has died"

    def end(self) -> list[Stream]:
        """All that was said."""
        self._over.set()
        return [stream for _ in self._processes for stream in self._found.get()]


def _client(
    url: str, options: argparse.Namespace, subjects: list[str], share: range, ended: Any, over: Any, found: Any
) -> None:
    streams: list[Stream] = []

    async def one(http: httpx.AsyncClient, index: int) -> None:
        rounds = index
        while not over.is_set():
            length = options.tokens * (1 + (index + rounds) % 4) // 4
            streams.append(await talk(http, NAME, subjects[rounds % len(subjects)], length))
            rounds += 1
            with ended.get_lock():
                ended.value += 1

    async def every() -> None:
        async with client(url) as http:
            await asyncio.gather(*(one(http, index) for index in share))

    asyncio.run(every())
    found.put(streams)


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=600)


async def talk(http: httpx.AsyncClient, model: str, subject: str, tokens: int) -> Stream:
    stream = Stream(subject, time.perf_counter())
    body = question(model, subject, tokens) | {"stream": True}
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                stream.error = f"{reply.status_code} {(await reply.aread())[:200]!r}"
                return stream
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    _take(stream, json.loads(line[6:]))
    except httpx.HTTPError as error:
        stream.error = f"{type(error).__name__} {error}"
    stream.ended = time.perf_counter()
    return stream


def _take(stream: Stream, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        stream.error = str(chunk["error"])
        return
    piece = chunk["choices"][0]["delta"].get("content")
    if piece:
        stream.first = stream.first or time.perf_counter()
        stream.pieces.append(piece)


def question(model: str, subject: str, tokens: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"Tell me about {subject}."}
    return {"model": model, "messages": [question], "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
