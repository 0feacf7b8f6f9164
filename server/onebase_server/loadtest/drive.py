"""Sends a workload to a server and takes the times: one coroutine a request, streaming chat completions."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx

from onebase_server.loadtest.workload import PlannedRequest, Workload, plan


@dataclass(slots=True)
class Measured:
    """One request as its client saw it. Times in seconds after its own start."""

    model: str
    started_s: float
    ttft_s: float | None = None
    finished_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Between successive chunks that carried text: inter-token latency, where a server sends a chunk a token."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and the fields it needs beyond OpenAI's (such as vLLM's and our `ignore_eos`)."""

    url: str
    api_key: str = "none"
    extra_body: dict[str, object] = field(default_factory=dict)


async def drive(
    target: Target, workload: Workload, on_done: Callable[[Measured], None] = lambda _: None
) -> tuple[list[Measured], float]:
    """Run the workload; returns what each request saw and the wall time of the whole in seconds."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {target.api_key}"}
    async with httpx.AsyncClient(
        base_url=target.url, headers=headers, limits=limits, timeout=httpx.Timeout(30, read=600)
    ) as client:
        start = time.perf_counter()
        gate = asyncio.Semaphore(workload.concurrency or workload.requests)

        async def one(request: PlannedRequest) -> Measured:
            await asyncio.sleep(max(0.0, request.at_s - (time.perf_counter() - start)))
            async with gate:
                measured = await measure(client, target, request, time.perf_counter() - start)
            on_done(measured)
            return measured

        results = await asyncio.gather(*(one(request) for request in plan(workload)))
        return list(results), time.perf_counter() - start


async def measure(client: httpx.AsyncClient, target: Target, request: PlannedRequest, started_s: float) -> Measured:
    measured = Measured(request.model, started_s)
    body = {
        "model": request.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra_body,
    }
    begin = last = time.perf_counter()
    try:
        async for event in events(client, body):
            now = time.perf_counter()
            if usage := event.get("usage"):
                measured.prompt_tokens = usage["prompt_tokens"]
                measured.completion_tokens = usage["completion_tokens"]
                measured.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            if any(choice["delta"].get("content") for choice in event.get("choices", [])):
                if measured.ttft_s is None:
                    measured.ttft_s = now - begin
                else:
                    measured.gaps_s.append(now - last)
                last = now
        measured.finished_s = time.perf_counter() - begin
        if not measured.completion_tokens and measured.ttft_s is not None:
            measured.completion_tokens = 1 + len(measured.gaps_s)  # no usage in the stream: a chunk is a token
    except (httpx.HTTPError, RuntimeError, KeyError, ValueError) as error:
        measured.error = f"{type(error).__name__}: {error}"
    return measured


async def events(client: httpx.AsyncClient, body: dict[str, object]) -> AsyncIterator[dict]:  # type: ignore[type-arg]
    """The JSON events of one stream; raises RuntimeError on an error status or an error event."""
    async with client.stream("POST", "/chat/completions", json=body) as reply:
        if reply.is_error:
            raise RuntimeError(f"{reply.status_code}: {(await reply.aread())[:300].decode(errors='replace')}")
        async for line in reply.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                yield event
