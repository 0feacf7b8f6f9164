"""Many open streams at once: none may be lost, and a waiting one must cost little.

`python bench/streams.py --url URL --key KEY --pid PID --streams 1000`: opens them all, reads them all to their end, and
writes one JSON object; exit code 1 if a stream was lost or a waiting request takes more than 50 KB of the server.
"""

import argparse
import asyncio
import json
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil

MAX_BYTES_EACH = 50_000
DONE = b"data: [DONE]\n\n"


@dataclass
class Stream:
    status: int = 0
    first_s: float | None = None
    total_s: float = 0.0
    is_whole: bool = False
    why: str = ""


class Crowd:
    """All streams of one run; `peak` is the server's memory while most of them wait."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._process = psutil.Process(options.pid) if options.pid else None
        self.peak = 0

    async def run(self) -> list[Stream]:
        watcher = asyncio.create_task(self._watch())
        streams = await asyncio.gather(*(self._one(index) for index in range(self._options.streams)))
        watcher.cancel()
        return list(streams)

    async def _watch(self) -> None:
        while self._process is not None:
            self.peak = max(self.peak, self._process.memory_info().rss)
            await asyncio.sleep(0.02)

    async def _one(self, index: int) -> Stream:
        stream, begin = Stream(), time.perf_counter()
        try:
            await self._read(stream, begin, index)
        except OSError as error:
            stream.why = f"{type(error).__name__}: {error}"
        stream.total_s = time.perf_counter() - begin
        return stream

    async def _read(self, stream: Stream, begin: float, index: int) -> None:
        address = urlsplit(self._options.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(self._request(index))
            head = await reader.readuntil(b"\r\n\r\n")
            stream.status = int(head.split(b" ", 2)[1])
            tail = b""
            while piece := await reader.read(65536):
                if stream.first_s is None and b'"content":"' in piece.replace(b'"content":""', b""):
                    stream.first_s = time.perf_counter() - begin
                tail = (tail + piece)[-200:]
                if DONE in tail:
                    break
            stream.is_whole = stream.status == 200 and DONE in tail
            stream.why = "" if stream.is_whole else tail[-150:].decode("utf-8", "replace")
        except asyncio.IncompleteReadError:
            stream.why = "cut before its head"
        finally:
            writer.close()

    def _request(self, index: int) -> bytes:
        said = [{"role": "user", "content": f"Stream number {index}: tell me of ships."}]
        body = json.dumps(
            {"model": self._options.model, "messages": said, "stream": True, "max_tokens": self._options.tokens}
        ).encode()
        key = f"Authorization: Bearer {self._options.key}\r\n" if self._options.key else ""
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{key}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pid", type=int, help="of the server, on this machine: to weigh it")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = asyncio.run(measure(options))
    print(json.dumps(report, indent=1))
    return 0 if all(report["promises"].values()) else 1


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    few = Crowd(argparse.Namespace(**{**vars(options), "streams": min(64, options.streams)}))
    await few.run()  # what a full batch takes is not what a waiting request takes
    before = psutil.Process(options.pid).memory_info().rss if options.pid else 0
    begin = time.perf_counter()
    crowd = Crowd(options)
    streams = await crowd.run()
    took = time.perf_counter() - begin
    lost = [stream for stream in streams if not stream.is_whole]
    firsts = sorted(stream.first_s for stream in streams if stream.first_s is not None)
    each = (crowd.peak - before) / options.streams if options.pid else None
    return {
        "streams": options.streams,
        "tokens_each": options.tokens,
        "took_s": round(took, 2),
        "lost": len(lost),
        "why": [f"{stream.status} {stream.why}" for stream in lost[:5]],
        "first_token_s": {"p50": round(firsts[len(firsts) // 2], 3), "max": round(firsts[-1], 3)} if firsts else None,
        "rss_mb": {"before": round(before / 1e6, 1), "peak": round(crowd.peak / 1e6, 1)},
        "bytes_each": None if each is None else round(each),
        "promises": {
            "none lost": not lost,
            f"under {MAX_BYTES_EACH} bytes each": each is None or each < MAX_BYTES_EACH,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
