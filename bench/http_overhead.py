"""What HTTP costs on this CPU: one engine with 8 adapters, given the same streams in its own process and through HTTP.

The server runs as a process of its own: SmolLM2 in NF4, the real app and uvicorn. Rounds: all streams straight from the
engine, read by an event loop as the app reads it; and over sockets by this process, which does nothing but split events
(its share of the processor is in the result: on a small machine it takes it from the server). Then single requests of
both kinds, for the time to the first token. One JSON line goes to --out.

Both kinds are given the same: bodies of the same words, which differ in a number of as many tokens at their beginning
(so that neither finds the other's pages), and for the engine these bodies are planned by the app's own code beforehand,
so that sampling, limits and the prompt format's stop strings are the same. Which of a pair goes first, and which number
it gets, takes turns. "First token" is the first event with text, in which a beginning that may become a stop string is
held back on both sides alike. HTTP's time begins before the request is written to a connection that is open and ends
when this process has the text: parsing, the key's check, rendering, tokenising, and what client and event loop take
from the threads that compute are all in it. The engine's begins at `submit` and ends in the reader.

    PYTHONPATH=core:server:training python bench/http_overhead.py --out bench/results/http-overhead.jsonl
"""

import argparse
import json
import os
import platform
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DONE = b"data: [DONE]\n\n"
TEXT = b'"content":"'
NO_TEXT = b'"content":""'
WORDS = "harbour rope lantern tide captain gull storm biscuit compass anchor barrel deck mast wind chart keel".split()
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--home", type=Path, help="with the base in it; else one is made and the base fetched")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=32, help="of each prompt")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--singles", type=int, default=40, help="requests of each kind for the first-token time")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of quiet before each of those")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        served = Served(options.home or Path(scratch) / "home", options)
        try:
            report = measure(served, options)
        finally:
            served.end()
    print(json.dumps(report, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.write(json.dumps(report) + "\n")


class Served:
    """The server process. Orders are lines of JSON on its stdin, answers lines on its stdout."""

    def __init__(self, home: Path, options: argparse.Namespace) -> None:
        program = Path(__file__).with_name("http_overhead_server.py")
        order = {"home": str(home), "adapters": options.adapters, "streams": options.streams}
        self._process = subprocess.Popen(
            [sys.executable, str(program), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
        self.about = self._answer()
        self.address: tuple[str, int] = (self.about["host"], self.about["port"])

    def ask(self, **order: Any) -> Json:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server process has ended with code {self._process.wait()}")
        answer: Json = json.loads(line)
        return answer


@dataclass
class Wave:
    """Requests sent together. Seconds from the first byte sent."""

    first_s: list[float]
    total_s: float
    client_cpu_s: float


def wave(address: tuple[str, int], bodies: Sequence[bytes]) -> Wave:
    """All requests over connections opened beforehand, read until each stream's end."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    requests = [head + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
    connections = [socket.create_connection(address) for _ in bodies]
    firsts: dict[int, float] = {}
    tails = [b""] * len(bodies)
    with selectors.DefaultSelector() as selector:
        cpu, begin = time.process_time(), time.perf_counter()
        for index, (connection, request) in enumerate(zip(connections, requests, strict=True)):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, index)
        left = len(bodies)
        while left:
            for key, _ in selector.select():
                index, piece = key.data, connections[key.data].recv(65536)
                if index not in firsts and TEXT in (tails[index] + piece).replace(NO_TEXT, b""):
                    firsts[index] = time.perf_counter() - begin
                tails[index] = (tails[index] + piece)[-len(DONE) - 8 :]
                if DONE in tails[index] or not piece:
                    if not piece:
                        raise RuntimeError("a stream was cut")
                    selector.unregister(connections[index])
                    left -= 1
        took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    for connection in connections:
        connection.close()
    return Wave(sorted(firsts.values()), took, cpu)


def measure(served: Served, options: argparse.Namespace) -> Json:
    models = served.about["models"]

    def bodies(turn: int, kind: int, count: int, tokens: int) -> list[Json]:
        """Of one turn, for one of its two kinds."""
        return [
            chat(models[(turn + i) % len(models)], prompt(turn + i, 2000 * turn + 2 * i + kind, options.words), tokens)
            for i in range(count)
        ]

    def both(turn: int, count: int, tokens: int, pause_s: float = 0.0) -> tuple[Json, Json]:
        """What the engine did, what HTTP did. The kinds swap numbers every turn, and places every second one."""
        engine_kind, http_first = turn % 2, turn // 2 % 2
        answers: dict[bool, Json] = {}
        for is_http in (True, False) if http_first else (False, True):
            time.sleep(pause_s)
            asked = bodies(turn, 1 - engine_kind if is_http else engine_kind, count, tokens)
            answers[is_http] = over_http(served, asked) if is_http else served.ask(bodies=asked)
        return answers[False], answers[True]

    both(0, options.streams, options.tokens)  # adapters are loaded and memory is touched: not counted
    rounds = [both(turn, options.streams, options.tokens) for turn in range(1, options.rounds + 1)]
    singles = [both(turn, 1, 4, options.pause) for turn in range(100, 100 + options.singles)]
    return summary(rounds, singles[2:], served.about, options)


def over_http(served: Served, asked: list[Json]) -> Json:
    before = served.ask()
    seen = wave(served.address, [json.dumps(body).encode() for body in asked])
    after = served.ask()
    tokens = sum(body["max_tokens"] for body in asked)
    loop_s = after["loop_cpu_s"] - before["loop_cpu_s"]
    return {
        "tok_s": tokens / seen.total_s,
        "first_s": statistics.median(seen.first_s),
        "loop_us_per_token": loop_s / tokens * 1e6,
        "client_us_per_token": seen.client_cpu_s / tokens * 1e6,
        "loop_share": loop_s / seen.total_s / (os.cpu_count() or 1),
        "client_share": seen.client_cpu_s / seen.total_s / (os.cpu_count() or 1),
    }


def prompt(seed: int, number: int, words: int) -> str:
    """As many tokens for every number: this tokenizer makes one of each digit."""
    return f"{number:07d} " + " ".join(WORDS[(seed * 7919 + i * (seed % 13 + 3)) % len(WORDS)] for i in range(words))


def chat(model: str, text: str, tokens: int) -> Json:
    said = [{"role": "user", "content": text}]
    return {
        "model": model,
        "messages": said,
        "stream": True,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def summary(
    rounds: list[tuple[Json, Json]], singles: list[tuple[Json, Json]], about: Json, options: argparse.Namespace
) -> Json:
    def middle(values: Sequence[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    alone_ms, http_ms = ([pair[kind]["first_s"] * 1e3 for pair in singles] for kind in (0, 1))
    added_ms = [http - alone for alone, http in zip(alone_ms, http_ms, strict=True)]
    overhead = [1 - http["tok_s"] / engine["tok_s"] for engine, http in rounds]
    return {
        "case": "http overhead on the CPU",
        "engine_tok_s": middle([engine["tok_s"] for engine, _ in rounds], 1),
        "http_tok_s": middle([http["tok_s"] for _, http in rounds], 1),
        "overhead": middle(overhead, 4),
        "overhead_of_rounds": [round(each, 4) for each in overhead],
        "engine_first_s_at_once": middle([engine["first_s"] for engine, _ in rounds], 3),
        "http_first_s_at_once": middle([http["first_s"] for _, http in rounds], 3),
        "engine_first_ms_alone": middle(alone_ms, 2),
        "http_first_ms_alone": middle(http_ms, 2),
        "first_ms_added": middle(added_ms, 2),
        "first_ms_added_quartiles": [round(each, 2) for each in statistics.quantiles(added_ms)],
        **{
            name: middle([http[name] for _, http in rounds], 4)
            for name in rounds[0][1]
            if name not in ("tok_s", "first_s")
        },
        "promises": {
            "at most 8 %": statistics.median(overhead) <= 0.08,
            "less than 3 ms": statistics.median(added_ms) < 3,
        },
        **{name: value for name, value in vars(options).items() if name not in ("out", "home")},
        "base": about["base"],
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "client_max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "at": int(time.time()),
    }


if __name__ == "__main__":
    main()
