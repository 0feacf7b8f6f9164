"""A whole server in the test's process: the real app, engine and store over `FakeRunner`; no torch, no socket.

The fake model says what `world.says` tells it to, or, under an adapter, `<name>@<version> says: <that>`.
"""

import asyncio
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
from litestar import Litestar
from safetensors.numpy import save_file

from fakes import EOS, FakeRunner, FakeTokenizer
from migrated import give_tables
from onebase.bases import BaseSpec
from onebase.home import Home
from onebase.store import AdapterStore, Version
from onebase.tokenizer import TextTokenizer
from onebase_server.api.backend import BackendSlot
from onebase_server.api.deps import AppDeps
from onebase_server.api.metrics import Metrics
from onebase_server.app import create_app
from onebase_server.engine.runner import SampleRow
from onebase_server.engine.stats import EngineStats
from onebase_server.jobs.assembly import DurableConfig, assemble
from onebase_server.jobs.job_limits import JobLimits
from onebase_server.jobs.process import RunCommand
from onebase_server.jobs.supervisor import SupervisorConfig
from onebase_server.jobs.watch import RunTimes
from onebase_server.loading import start_backend
from onebase_server.settings import Settings
from scripted_base import IDENTITY, SCRIPTED_BASE

BASE = "tiny/base"
NUMBERS = itertools.count(1.0)
LOOPBACK = ("127.0.0.1", 50000)


@dataclass
class World:
    """One server. `deps` can be replaced before `app` is first used."""

    home: Home
    runner: FakeRunner
    deps: AppDeps
    app: Litestar
    loop: asyncio.AbstractEventLoop
    says: str = "Hello there."
    client: tuple[str, int] = LOOPBACK
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> AdapterStore:
        return self.deps.store

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            app = cast(Any, self.app)  # the ASGI dicts are typed twice
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=self.client)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                return await http.request(method, path, **{"headers": self.headers, **options})

        return self.loop.run_until_complete(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.request("POST", path, **({"json": body} if body is not None else {}), **options)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", chat_body(**fields))

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": BASE, "prompt": "Once", **fields})

    def chunks(self, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed chat, `[DONE]` checked and left out."""
        return events_of(self.chat(stream=True, **fields))

    def publish(self, name: str) -> Version:
        return self.store.publish(lora_folder(self.home.root / "peft"), name, base=IDENTITY)


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], **fields}


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """Data events of a stream; fails on anything that is not OpenAI's framing."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = reply.content.split(b"\n\n")
    assert blocks.pop() == b"", "the last event must end by an empty line"
    assert blocks.pop() == b"data: [DONE]"
    assert all(block.startswith(b"data: {") and b"\n" not in block and b"\r" not in block for block in blocks)
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object, its shape checked."""
    body = reply.json()
    assert list(body) == ["error"], body
    error = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["code"] is None or isinstance(error["code"], str)
    return dict(error)


def lora_folder(path: Path) -> Path:
    """PEFT's two files with one tiny pair of matrices, never the same twice: equal content is one version."""
    path.mkdir(parents=True, exist_ok=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": np.zeros((2, 8), np.float32),
        f"{name}.lora_B.weight": np.full((8, 2), next(NUMBERS), np.float32),
    }
    save_file(tensors, str(path / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": BASE, "bias": "none"}))
    return path


def base_spec(folder: Path) -> BaseSpec:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return BaseSpec(BASE, folder, IDENTITY, {"max_position_embeddings": 512, "vocab_size": FakeTokenizer.vocab_size})


@contextmanager
def open_world(root: Path, loop: asyncio.AbstractEventLoop, **options: Any) -> Iterator[World]:
    """`settings`: overrides of Settings; `runner`: of FakeRunner; `trainer`: the retrain command's program."""
    home = Home(root / "home").create()
    settings = Settings(home=home, **options.get("settings", {}))
    store = AdapterStore(home.adapters)
    spec = base_spec(home.bases / "tiny")
    command = RunCommand(program=options.get("trainer", ("false",)))
    times = RunTimes(poll_s=0.01, cancel_grace_s=0.3, max_losses=2)
    config = DurableConfig(
        database=settings.database,
        limits=JobLimits(settings.retrain_queue, settings.key_jobs),
        supervisor=SupervisorConfig(look_s=0.05, times=times),
    )
    if settings.database is None:
        give_tables(home.root / "onebase.db")
    durable = assemble(home, store, command, config, lambda _: SCRIPTED_BASE)
    runner = FakeRunner(reply=lambda digest, prompt: world_reply(world, digest), **options.get("runner", {}))
    backend = start_backend(settings, spec, runner, cast(TextTokenizer, FakeTokenizer()))
    deps = AppDeps(settings=settings, store=store, backend=BackendSlot(backend), durable=durable, metrics=Metrics())
    world = World(home, runner, deps, create_app(deps), loop)
    loop.run_until_complete(durable.start())
    try:
        yield world
    finally:
        backend.engine.stop()
        loop.run_until_complete(durable.stop())


def world_reply(world: World, digest: str | None) -> list[int]:
    named = {version.digest: version.id for entry in world.store.list() for version in entry.versions}
    prefix = f"{named[digest]} says: " if digest is not None else ""
    return list((prefix + world.says).encode())


def with_settings(world: World, **changes: Any) -> World:
    """The same server under other settings."""
    deps = replace(world.deps, settings=replace(world.deps.settings, **changes))
    return replace(world, deps=deps, app=create_app(deps))


def settled_stats(world: World) -> EngineStats:
    """Once the last step is over: answers go out a moment before that."""
    engine = world.deps.backend.get().engine
    engine.adapters().result()  # obeyed between steps
    return engine.stats()


def obey_masks(runner: FakeRunner) -> None:
    """From now on a constrained sequence says what it wants where that is allowed, else the nearest end."""
    wants = runner._next_token

    def obey(row: SampleRow, digest: str | None, summary: int) -> int:
        token = wants(row, digest, summary)
        if row.mask is None:
            return token
        allowed = np.flatnonzero(np.unpackbits(row.mask.view(np.uint8), bitorder="little")).tolist()
        if token in allowed:
            return token
        ends = [end for end in (EOS, ord('"'), ord("}"), ord("n")) if end in allowed]
        return int((ends or allowed)[0])

    runner._next_token = obey  # type: ignore[method-assign]
