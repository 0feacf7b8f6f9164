"""Mixed load for as long as you like, and what is left of it: `python bench/soak.py --url URL --key ADMIN --pid PID`.

Chats of every kind, clients that hang up, requests that are wrong, versions that change and leave memory, files, keys,
training runs. At the end nothing may be held: sequences, pages, leases, connections; memory must be flat. Writes one
JSON object; exit code 1 if a promise is broken. A server of your own adapters will do: it changes which version is
served, and what it makes it takes away again. For memory to mean something let it run for half an hour.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

MAX_GROWTH = 0.03
POOLS = 16
"""Threads and file handles by which pools may still grow after the warm-up: they have bounds, a leak has none."""
KEPT = 20
"""Newest versions of the adapter that is trained anew: older ones are deleted, as who retrains all day would."""
TASKS = 8
"""More than at the start, when nobody asks for anything: a run that is still training has some of its own."""
RETRAINED = "soak"
"""The adapter that is trained anew, and asked as the others are. No hand moves its name: a run gives way to one."""
WARM_UP = 0.25
"""Of the time: what is allocated until then counts as standing."""
LINE = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


@dataclass
class Soak:
    http: httpx.AsyncClient
    models: list[str]
    adapters: dict[str, list[int]]
    dataset: str | None
    rng: random.Random
    until: float
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def work(self) -> None:
        """One client: something, and then something else."""
        kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.chat, 30), (self.stream, 30), (self.leave, 12), (self.complete, 8), (self.bad, 10), (self.swap, 3),
            (self.unload, 2), (self.file, 2), (self.key, 1), (self.look, 2),
        ]  # fmt: skip
        while time.monotonic() < self.until:
            [(kind, _)] = self.rng.choices(kinds, weights=[weight for _, weight in kinds])
            try:
                await kind()
            except httpx.TransportError as error:
                self.wrong.append(f"{kind.__name__}: {type(error).__name__} {error}")
            self.done[kind.__name__] += 1

    async def call(self, method: str, path: str, *allowed: int, **options: Any) -> httpx.Response:
        reply = await self.http.request(method, path, **options)
        if reply.status_code not in (allowed or (200,)):
            self.wrong.append(f"{method} {path}: {reply.status_code} {reply.text[:200]}")
        return reply

    def body(self, **fields: Any) -> dict[str, Any]:
        said = [{"role": "user", "content": "Tell me about " + "ships " * self.rng.randrange(1, 40)}]
        limit = self.rng.choice([1, 4, 16, 48])
        return {"model": self.rng.choice(self.models), "messages": said, "max_tokens": limit, **fields}

    async def chat(self) -> None:
        n = self.rng.choice([1, 1, 1, 3])
        await self.call("POST", "/v1/chat/completions", json=self.body(n=n, temperature=self.rng.choice([0, 1])))

    async def stream(self) -> None:
        async with self.http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as reply:
            text = "".join([piece async for piece in reply.aiter_text()])
        if reply.status_code != 200 or not text.endswith("data: [DONE]\n\n") or '"error"' in text:
            self.wrong.append(f"stream: {reply.status_code} ...{text[-200:]}")

    async def leave(self) -> None:
        """Hang up before or after the first byte."""
        with suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(self.rng.uniform(0.001, 0.2)):
                async with self.http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as reply:
                    async for _ in reply.aiter_raw():
                        if self.rng.random() < 0.3:
                            return

    async def complete(self) -> None:
        prompts = ["Once", "Upon a time"][: self.rng.choice([1, 2])]
        await self.call("POST", "/v1/completions", json={"model": self.models[0], "prompt": prompts, "max_tokens": 8})

    async def bad(self) -> None:
        spoilt: list[dict[str, Any]] = [
            {"json": self.body(temperature=9)}, {"json": self.body(model="nobody")}, {"content": b"{"},
            {"json": self.body(messages=[])}, {"json": {"deep": [[[[]]]]}},
        ]  # fmt: skip
        await self.call("POST", "/v1/chat/completions", 400, 404, **self.rng.choice(spoilt))

    async def swap(self) -> None:
        name = self.rng.choice(list(self.adapters))
        versions = self.adapters[name]
        if len(versions) > 1 and self.rng.random() < 0.5:
            body: dict[str, Any] = {"weights": {str(each): 1 / len(versions) for each in versions}}
        else:
            body = {"version": self.rng.choice(versions)}
        await self.call("POST", f"/admin/adapters/{name}/publish", json=body)

    async def unload(self) -> None:
        await self.call("POST", f"/admin/adapters/{self.rng.choice(list(self.adapters))}/unload")

    async def file(self) -> None:
        data = (json.dumps(LINE) + "\n").encode() * 20
        made = await self.call("POST", "/v1/files", files={"file": ("s.jsonl", data)}, data={"purpose": "fine-tune"})
        await self.call("DELETE", f"/v1/files/{made.json()['id']}")

    async def key(self) -> None:
        made = (await self.call("POST", "/admin/keys", json={"name": "soak", "rpm": 2})).json()
        headers = {"Authorization": f"Bearer {made['key']}"}
        for _ in range(3):
            await self.call("POST", "/v1/chat/completions", 200, 429, json=self.body(), headers=headers)
        await self.call("DELETE", f"/admin/keys/{made['id']}")

    async def look(self) -> None:
        for path in ("/v1/models", "/metrics", "/readyz", "/admin/adapters"):
            await self.call("GET", path)

    async def retrain(self) -> None:
        """Runs one after the other beside everything else, if a dataset was named."""
        while self.dataset is not None and time.monotonic() < self.until:
            body = {"adapter": RETRAINED, "dataset": self.dataset, "hyperparameters": {"max_steps": 5}}
            run = (await self.call("POST", "/admin/retrain", json=body)).json()
            while time.monotonic() < self.until and run.get("state") not in ("succeeded", "failed", "cancelled"):
                await asyncio.sleep(1)
                run = (await self.call("GET", f"/admin/retrain/{run['id']}")).json()
            self.done[f"retrain {run.get('state')}"] += 1
            if run.get("state") == "succeeded":
                if RETRAINED not in self.models:
                    self.models.append(RETRAINED)
                await self.delete_old(RETRAINED)

    async def delete_old(self, name: str) -> None:
        """What was trained here; not what is served just now."""
        card = (await self.call("GET", f"/admin/adapters/{name}")).json()
        numbers = [version["version"] for version in card["versions"]]
        served = {each["version"] for each in card["serving"]}
        for number in numbers[:-KEPT]:
            if number not in served:
                await self.call("DELETE", f"/v1/models/{name}@{number}")
                self.done["delete"] += 1


@dataclass(frozen=True)
class Weight:
    """What the server process takes up."""

    rss: int
    fds: int
    threads: int


def weigh(pid: int) -> Weight:
    process = psutil.Process(pid)
    return Weight(process.memory_info().rss, process.num_fds(), process.num_threads())


async def number(http: httpx.AsyncClient, name: str) -> float:
    """One of the server's own metrics."""
    found = re.search(rf"^{name} (\S+)", (await http.get("/metrics")).text, re.MULTILINE)
    assert found is not None
    return float(found[1])


async def held(http: httpx.AsyncClient) -> dict[str, float]:
    """What the server holds for requests, by its own word: all of it nought when nobody asks for anything."""
    names = (
        "onebase_sequences_running",
        "onebase_sequences_waiting",
        "onebase_sequences_queued",
        "onebase_kv_pages_held",
    )
    found = {name: await number(http, name) for name in names}
    cards = (await http.get("/admin/adapters")).json()["data"]
    versions = [version for card in cards for version in card["versions"]]
    return {**found, **{what: float(sum(each[what] for each in versions)) for what in ("leases", "running")}}


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=120, limits=limits) as http:
        listed = (await http.get("/admin/adapters")).json()["data"]
        adapters = {card["name"]: [version["version"] for version in card["versions"]] for card in listed}
        models = [card["id"] for card in (await http.get("/v1/models")).json()["data"]]
        if not adapters:
            raise SystemExit("the server has no adapter: publish one or more first")
        tasks = await number(http, "onebase_tasks")
        rng = random.Random(options.seed)
        mix = Soak(http, models, adapters, options.dataset, rng, time.monotonic() + options.seconds)
        workers = [asyncio.create_task(mix.work()) for _ in range(options.clients)]
        workers.append(asyncio.create_task(mix.retrain()))
        await asyncio.sleep(options.seconds * WARM_UP)
        warm = weigh(options.pid)
        await asyncio.gather(*workers)
        left = await settle(http)
        tasks_left = await number(http, "onebase_tasks")
        end = weigh(options.pid)
    growth = end.rss / warm.rss - 1
    promises = {
        "no error that the client did not cause": not mix.wrong,
        "nothing held": not any(left.values()),
        f"memory within {MAX_GROWTH:.0%}": growth <= MAX_GROWTH,
        "no task leaked": tasks_left <= tasks + TASKS,
        "no file handle leaked": end.fds <= warm.fds + POOLS,
        "no thread leaked": end.threads <= warm.threads + POOLS,
    }
    return {
        "seconds": options.seconds,
        "clients": options.clients,
        "done": dict(mix.done),
        "held": left,
        "rss_mb": {"warm": round(warm.rss / 1e6, 1), "end": round(end.rss / 1e6, 1), "growth": round(growth, 4)},
        "tasks": {"start": tasks, "end": tasks_left},
        "fds": {"warm": warm.fds, "end": end.fds},
        "threads": {"warm": warm.threads, "end": end.threads},
        "wrong": mix.wrong[:20],
        "promises": promises,
    }


async def settle(http: httpx.AsyncClient, wait_s: float = 20.0) -> dict[str, float]:
    """Give those who hung up their moment to be noticed."""
    give_up_at = time.monotonic() + wait_s
    while any((left := await held(http)).values()) and time.monotonic() < give_up_at:
        await asyncio.sleep(0.2)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="an admin key; none for a server without keys")
    parser.add_argument("--pid", type=int, required=True, help="of the server, on this machine")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--dataset", help="train on this dataset of the server's all the while")
    parser.add_argument("--seed", type=int, default=1)
    report = asyncio.run(soak(parser.parse_args()))
    print(json.dumps(report, indent=1))
    return 0 if all(report["promises"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
