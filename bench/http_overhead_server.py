"""The served side of `http_overhead.py`: the whole server in this process, and its engine on order without HTTP.

An order is a line of JSON on stdin: `bodies` of chat requests run those on the engine; {} asks for the event loop's
processor time. Every answer is a line on stdout.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from onebase.bases import BaseSpec
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_server.api.backend import Backend
from onebase_server.api.chat_plan import check_chat, plan_chat
from onebase_server.api.models_lookup import look_up
from onebase_server.api.schemas_chat import ChatRequest
from onebase_server.compose import SWITCH_S, Server
from onebase_server.loading import find_base, load_backend
from onebase_server.settings import Settings

RANK = 8
MODULES = ("q_proj", "k_proj", "v_proj")
Json = dict[str, Any]


def main() -> None:
    order = json.loads(sys.argv[1])
    home = Home(Path(order["home"])).create()
    settings = Settings(home=home, port=0, max_sequences=order["streams"], kv_tokens=order["streams"] * 256)
    spec = find_base(settings)
    store = AdapterStore(home.adapters)
    models = [publish(store, spec, f"bench-{index}") for index in range(order["adapters"])]
    sys.setswitchinterval(SWITCH_S)
    server = Server(settings, load_backend)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    server.loaded.wait()
    if server.failed:
        thread.join()
        raise SystemExit("the base could not be loaded")
    backend = server.deps.backend.get()
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    host, port = server.url.removeprefix("http://").split(":")
    tell({"host": host, "port": int(port), "models": models, "base": backend.base.id})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked:
            tell(asyncio.run(in_engine(backend, store, asked["bodies"])))
        else:
            tell({"loop_cpu_s": time.clock_gettime(clock)})
    server.stop()
    thread.join()


def tell(answer: Json) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def publish(store: AdapterStore, spec: BaseSpec, name: str) -> str:
    """A random adapter: speed does not depend on its values."""
    rng = np.random.default_rng(sum(name.encode()))
    tensors = {}
    for module, (rows, columns) in spec.linear_shapes.items():
        if module.endswith(MODULES):
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.01, (RANK, columns)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.01, (rows, RANK)).astype(np.float32)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        named = {**config, "target_modules": list(MODULES), "base_model_name_or_path": spec.id}
        (folder / "adapter_config.json").write_text(json.dumps(named))
        return store.publish(folder, name, base=spec.identity).name


async def in_engine(backend: Backend, store: AdapterStore, bodies: list[Json]) -> Json:
    """The requests that the app would submit for these bodies, made beforehand; their events are read and dropped."""
    requests = []
    for body in bodies:
        asked = ChatRequest.model_validate(body)
        given = check_chat(asked, asked.n or 1)
        requests.append(plan_chat(asked, given, look_up(asked.model, backend, store), backend).request)
    firsts: list[float] = []
    begin = time.perf_counter()
    handles = [backend.engine.submit(request) for request in requests]

    async def read(index: int) -> int:
        tokens, first = 0, True
        async for event in handles[index].events():
            if first and event.text:
                firsts.append(time.perf_counter() - begin)
                first = False
            tokens += len(event.token_ids)
        return tokens

    tokens = sum(await asyncio.gather(*map(read, range(len(handles)))))
    took = time.perf_counter() - begin
    return {"tok_s": tokens / took, "first_s": statistics.median(firsts), "tokens": tokens}


if __name__ == "__main__":
    main()
