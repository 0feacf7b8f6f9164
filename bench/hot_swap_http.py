"""A hot swap under load, over HTTP: what a publish costs those who are talking, and how soon the new version speaks.

Starts a server of its own (SmolLM2 in NF4 or --base; random adapters strong enough to change every answer), keeps
STREAMS streams of one adapter open from --clients processes (some 3,500 tokens a second are all that one can read), and
publishes versions that were never loaded, one after the other; one request more asks for the name as soon as each
publish is answered. Greedy texts tell which version spoke: each must be the whole text that one version gives alone.
Where a sum's order depends on the batch (CUDA) texts part at near ties: with --ties, a text may leave its version's at
a token that was so few nats behind the best there, and what follows is not looked at (`followed`: the share of all
text that was).
PYTHONPATH=core:server:tests:bench python bench/hot_swap_http.py [--out FILE]. One JSON line; exit code 1 if a promise
is broken.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from bisect import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file
from swap_streams import NAME, Clients, Stream, client, question, talk

from onebase.bases import EMBEDDED_ID, BaseSpec, read_base, resolve_base
from onebase.store import AdapterStore

SUBJECTS = ("ships", "rain", "bread", "stars", "music", "roads", "glass", "winter")
WITHIN_S = 0.05


@dataclass(frozen=True)
class Swap:
    """`called` and `answered`: the admin's call. From `answered` on the name must mean `version`."""

    version: int
    called: float
    answered: float


@dataclass(frozen=True)
class Alone:
    """What a version says when nobody else speaks. `ends`: of its tokens, in `text`; `ties`: what might stand there."""

    text: str
    ends: tuple[int, ...]
    ties: tuple[tuple[str, ...], ...]

    def follows(self, text: str) -> int:
        """How many characters of `text` are this version's; 0 if it can't be."""
        pairs = zip(self.text, text, strict=False)
        same = next((i for i, (own, other) in enumerate(pairs) if own != other), min(len(self.text), len(text)))
        if same == len(text):
            return same
        index = bisect(self.ends, same)
        if index == len(self.ends):
            return 0
        rest = text[self.ends[index - 1] if index else 0 :]
        return max(same, 1) if any(rest.startswith(other) for other in self.ties[index]) else 0


class Load:
    """Swaps, beside client processes whose streams never pause and have lengths that keep them out of step."""

    def __init__(self, http: httpx.AsyncClient, options: argparse.Namespace) -> None:
        self._http, self._options, self._tokens = http, options, options.tokens
        self._last = options.swaps + 1
        self.alone: dict[tuple[int, str], Alone] = {}
        self._subjects: list[str] = []
        self.streams: list[Stream] = []
        self.swaps: list[Swap] = []

    async def run(self) -> None:
        beginnings: dict[str, list[str]] = {subject: [] for subject in SUBJECTS}
        for version in range(1, self._last + 1):
            answers = await asyncio.gather(*(self._ask_alone(f"{NAME}@{version}", subject) for subject in SUBJECTS))
            for subject, alone in zip(SUBJECTS, answers, strict=True):
                self.alone[version, subject] = alone
                beginnings[subject].append(alone.text[: alone.ends[self._tokens // 8 - 1]])
            if version > 1:  # on the disk again: a swap must find it cold
                await self._admin("unload", version)
        # The shortest answers must tell the versions apart already.
        self._subjects = [subject for subject, texts in beginnings.items() if len(set(texts)) == len(texts)]
        assert self._subjects, "the versions answer alike"
        with Clients(str(self._http.base_url), self._options, self._subjects) as clients:
            await self._swap(clients)
            self.streams += clients.end()
        for stream in self.streams:
            self._judge(stream)

    def _judge(self, stream: Stream) -> None:
        text = "".join(stream.pieces)
        told = [(alone.follows(text), v) for (v, s), alone in self.alone.items() if s == stream.subject]
        stream.followed, stream.version = max(told)
        stream.version = stream.version if stream.followed else 0

    async def _swap(self, clients: "Clients") -> None:
        await self._rest(clients)
        for version in range(2, self._last + 1):
            called = time.perf_counter()
            await self._admin("publish", version)
            answered = time.perf_counter()
            self.swaps.append(Swap(version, called, answered))
            asked = await talk(self._http, NAME, self._subjects[version % len(self._subjects)], self._tokens)
            asked.asked_at = answered
            self.streams.append(asked)
            await self._rest(clients)

    async def _rest(self, clients: "Clients") -> None:
        """Until every stream has had its turn, and so long at least."""
        seen = clients.ended.value
        await asyncio.sleep(self._options.pause)
        while clients.ended.value < seen + 2 * self._options.streams:
            clients.check()
            await asyncio.sleep(0.05)

    async def _admin(self, verb: str, version: int) -> None:
        reply = await self._http.post(f"/admin/adapters/{NAME}/{verb}", json={"version": version})
        assert reply.status_code == 200, reply.text

    async def _ask_alone(self, model: str, subject: str) -> Alone:
        body = question(model, subject, self._tokens) | {"logprobs": True, "top_logprobs": 20}
        reply = await self._http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        ends, ties = [0], []
        for token in choice["logprobs"]["content"]:
            ends.append(ends[-1] + len(token["token"]))
            least = token["logprob"] - self._options.ties
            ties.append(
                tuple(t["token"] for t in token["top_logprobs"] if self._options.ties and t["logprob"] >= least)
            )
        return Alone(choice["message"]["content"], tuple(ends[1:]), tuple(ties))


def report(load: Load, streams: int) -> dict[str, Any]:
    """Milliseconds. `steady`: streams that began far from a swap; `first`: the first that spoke of each version;
    `asked`: the one that asked for the name as soon as the publish was answered, beside the streams."""
    good = [stream for stream in load.streams if not stream.error]
    swaps = load.swaps
    stale = [
        stream for stream in good
        if stream.version and stream.version < max((s.version for s in swaps if s.answered < stream.begun), default=1)
    ]  # fmt: skip
    firsts = [
        min((s for s in good if s.version == swap.version and s.begun >= swap.called), key=lambda s: s.first)
        for swap in swaps
    ]
    begun_first = [min((s for s in good if s.version == swap.version), key=lambda s: s.begun) for swap in swaps]
    near = [s for s in good if s.asked_at or any(swap.called - 0.1 < s.begun < swap.answered + 0.3 for swap in swaps)]
    steady = [s.first - s.begun for s in good if s not in near]
    asked = [s.first - s.asked_at for s in good if s.asked_at]
    cost = statistics.median(asked) - statistics.median(steady)
    ended = sum(len(s.pieces) for s in good) / (max(s.ended for s in good) - min(s.begun for s in good))
    failed = [s.error for s in load.streams if s.error]
    mixed = [s for s in good if not s.version]
    after = [first.first - swap.answered for first, swap in zip(firsts, swaps, strict=True)]
    return {
        "streams": streams,
        "swaps": len(swaps),
        "requests": len(load.streams),
        "chunks_per_s": round(ended, 1),
        "failed": len(failed),
        "why": failed[:3],
        "mixed": len(mixed),
        "followed": round(sum(s.followed for s in good) / max(1, sum(len("".join(s.pieces)) for s in good)), 3),
        "across_a_swap": sum(s.begun < swap.called and swap.answered < s.ended for s in good for swap in swaps),
        "stale": len(stale),
        "publish_call_ms": spread([swap.answered - swap.called for swap in swaps]),
        "publish_to_first_request_begun_ms": spread(
            [max(0.0, s.begun - swap.answered) for s, swap in zip(begun_first, swaps, strict=True)]
        ),
        "publish_to_first_token_ms": spread(after),
        "asked_at_once_to_first_token_ms": spread(asked),
        "first_token_of_the_first_ms": spread([first.first - first.begun for first in firsts]),
        "steady_first_token_ms": spread(steady),
        "first_token_near_a_swap_ms": spread([s.first - s.begun for s in near]),
        "promises": {
            "no failed request": not failed,
            "no mixed request": not mixed,
            "no request on the old version after the publish": not stale,
            "a token of the new version within 50 ms of the publish": max(after) <= WITHIN_S,
            "the first to ask for the new version waits no 50 ms longer than anyone": cost <= WITHIN_S,
        },
    }


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50": round(statistics.median(ordered) * 1e3, 1),
        "p95": round(ordered[round(0.95 * (len(ordered) - 1))] * 1e3, 1),
        "max": round(ordered[-1] * 1e3, 1),
    }


def publish_versions(store: AdapterStore, spec: BaseSpec, count: int, scratch: Path) -> None:
    """All in the store, the first of them served."""
    for number in range(count):
        rng = np.random.default_rng(number)
        tensors = {}
        for module, (out, inner) in spec.linear_shapes.items():
            if module.endswith("v_proj"):
                prefix = f"base_model.model.{module}"
                tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.1, (8, inner)).astype(np.float32)
                tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.1, (out, 8)).astype(np.float32)
        scratch.mkdir(exist_ok=True)
        save_file(tensors, str(scratch / "adapter_model.safetensors"))
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj"]}
        (scratch / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": spec.id}))
        store.publish(scratch, NAME, base=spec.identity, prompt_format="chat_template", make_current=number == 0)


async def drive(url: str, options: argparse.Namespace) -> dict[str, Any]:
    async with client(url) as http:
        load = Load(http, options)
        await load.run()
    return report(load, options.streams)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--clients", type=int, default=1, help="processes that hold the streams")
    parser.add_argument("--swaps", type=int, default=8)
    parser.add_argument("--pause", type=float, default=2.0, help="least seconds between swaps")
    parser.add_argument("--tokens", type=int, default=48, help="of the longest answer")
    parser.add_argument("--base", type=Path, help="a base folder; else the embedded base")
    parser.add_argument("--ties", type=float, default=0.0, help="nats; 0: whole texts must be the same")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, help="append the line to this file")
    options = parser.parse_args()
    from real_process import Process

    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONEBASE_MAX_SEQUENCES"] = str(max(64, options.streams + 1))
        process = Process(Path(folder) / "home", options.base)
        try:
            spec = resolve_base(process.home, EMBEDDED_ID) if options.base is None else read_base(options.base)
            publish_versions(AdapterStore(process.home.adapters), spec, options.swaps + 1, Path(folder) / "peft")
            process.wait_for("ready: ")
            found = asyncio.run(drive(process.url, options))
        finally:
            process.child.terminate()
            process.child.wait()
    setup = {
        "base": spec.id,
        "device": os.environ.get("ONEBASE_DEVICE", "auto"),
        "ties": options.ties,
        "clients": options.clients,
    }
    line = {"note": options.note, "at": int(time.time()), **setup, "cores": os.cpu_count(), **found}
    print(json.dumps(line, indent=1))
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return 0 if all(found["promises"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
