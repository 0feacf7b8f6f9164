"""The real thing: the server's own process, real weights (SmolLM2 in NF4), the official client, signals."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from safetensors.numpy import save_file

from onebase.bases import EMBEDDED_ID, BaseSpec, resolve_base
from onebase.store import AdapterStore
from real_process import Process

pytestmark = pytest.mark.slow

HI: Any = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("real") / "home")
    try:
        # it answers before the base is there
        assert httpx.get(f"{process.url}/healthz", timeout=None).status_code == 200
        early = httpx.get(f"{process.url}/readyz", timeout=None)
        assert early.status_code in (200, 503)
        process.wait_for("ready: ")
        assert httpx.get(f"{process.url}/readyz", timeout=None).status_code == 200
        yield process
    finally:
        process.child.kill()
        process.child.wait()


@pytest.fixture
def client(process: Process) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def random_adapter(folder: Path, spec: BaseSpec, seed: int) -> Path:
    """A LoRA that nobody trained, strong enough to change every answer."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (out, inner) in spec.linear_shapes.items():
        if module.endswith("v_proj"):
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.2, (4, inner)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.2, (out, 4)).astype(np.float32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": spec.id}))
    return folder


def say(client: OpenAI, model: str, **fields: Any) -> str:
    settings = {"max_tokens": 16, "temperature": 0, **fields}
    return client.chat.completions.create(model=model, messages=HI, **settings).choices[0].message.content or ""


def test_the_base_answers_the_same_twice_and_streamed(client: OpenAI) -> None:
    text = say(client, EMBEDDED_ID)
    assert text.strip()
    assert say(client, EMBEDDED_ID) == text
    chunks = client.chat.completions.create(model=EMBEDDED_ID, messages=HI, max_tokens=16, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_seeded_choices_differ_and_repeat(client: OpenAI) -> None:
    def choices() -> list[str | None]:
        reply = client.chat.completions.create(
            model=EMBEDDED_ID, messages=HI, n=3, seed=7, temperature=1.2, max_tokens=12
        )
        return [choice.message.content for choice in reply.choices]

    first = choices()
    assert len(set(first)) > 1
    assert choices() == first


class Colour(BaseModel):
    name: str
    warm: bool


def test_a_typed_answer_is_typed(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=EMBEDDED_ID, messages=HI, response_format=Colour, temperature=0, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Colour)


def test_logprobs_are_of_the_text(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=EMBEDDED_ID, messages=HI, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == reply.choices[0].message.content
    for entry in entries:
        assert entry.logprob <= 0
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.token == entry.top_logprobs[0].token, "greedy takes the likeliest"


def test_an_adapter_published_meanwhile_answers_otherwise_and_in_the_same_batch(
    client: OpenAI, process: Process, tmp_path: Path
) -> None:
    import asyncio

    spec = resolve_base(process.home, EMBEDDED_ID)
    store = AdapterStore(process.home.adapters)
    alone = {EMBEDDED_ID: say(client, EMBEDDED_ID)}
    for seed, name in enumerate(("one", "two")):
        store.publish(
            random_adapter(tmp_path / name, spec, seed), name, base=spec.identity, prompt_format="chat_template"
        )
        alone[name] = say(client, name)
    assert len(set(alone.values())) == 3

    async def together() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="none") as client:
            calls = [
                client.chat.completions.create(model=model, messages=HI, max_tokens=16, temperature=0)
                for model in [*alone, *alone]
            ]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == [*alone.values(), *alone.values()]


def test_a_signal_lets_a_stream_finish_and_ends_with_code_0(client: OpenAI, process: Process) -> None:
    """The last one: the server is gone afterwards."""
    stream = client.chat.completions.create(
        model=EMBEDDED_ID, messages=HI, max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    process.child.send_signal(signal.SIGTERM)
    *_, last = chunks
    assert last.choices[0].finish_reason == "length"
    assert process.child.wait() == 0
