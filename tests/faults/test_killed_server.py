"""A server that is killed in the middle of everything, and the next one on the same home folder."""

import json
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_world import chat_body, lora_folder
from onebase.home import Home
from onebase.store import AdapterStore
from scripted_base import IDENTITY
from server_process import LINE, server

pytestmark = pytest.mark.slow


def upload(http: httpx.Client) -> Any:
    files = {"file": ("t.jsonl", LINE.encode() * 10)}
    return http.post("/v1/files", files=files, data={"purpose": "fine-tune"})


def test_what_was_answered_outlives_a_kill_and_what_was_not_leaves_no_halves(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    answered: dict[str, list[str]] = {"files": [], "keys": [], "chats": []}
    with server(home) as (process, http):
        AdapterStore(home.adapters).publish(lora_folder(tmp_path / "peft"), "pirate", base=IDENTITY)
        going = threading.Event()

        def work() -> None:
            with suppress(httpx.HTTPError):
                while True:
                    answered["files"].append(upload(http).json()["id"])
                    answered["keys"].append(http.post("/admin/keys", json={"name": "n"}).json()["id"])
                    body = chat_body(store=True, max_tokens=2)
                    answered["chats"].append(http.post("/v1/chat/completions", json=body).json()["id"])
                    if len(answered["chats"]) >= 3:
                        going.set()

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        with http.stream("POST", "/v1/chat/completions", json=chat_body(model="pirate", stream=True)) as stream:
            pieces = stream.iter_raw()
            next(pieces)
            going.wait()
            process.send_signal(signal.SIGKILL)
            process.wait()
            with suppress(httpx.TransportError):
                list(pieces)
        for worker in workers:
            worker.join()
    with server(home) as (process, http):
        assert {row["id"] for row in http.get("/v1/files").json()["data"]} >= set(answered["files"])
        assert {row["id"] for row in http.get("/admin/keys").json()["data"]} >= set(answered["keys"])
        chats = http.get("/v1/chat/completions", params={"limit": 100}).json()["data"]
        assert {row["id"] for row in chats} >= set(answered["chats"])
        for row in http.get("/v1/files").json()["data"]:
            assert http.get(f"/v1/files/{row['id']}/content").content == LINE.encode() * 10
        assert http.post("/v1/chat/completions", json=chat_body(model="pirate", max_tokens=2)).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_a_drain_finishes_what_runs_refuses_what_comes_and_is_unready_at_once(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    slowly = home.root / "slowly"
    slowly.touch()
    with server(home) as (process, http):
        with http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, max_tokens=200)) as stream:
            pieces = stream.iter_raw()
            text = next(pieces)
            process.send_signal(signal.SIGTERM)
            while http.get("/readyz").status_code == 200:
                pass
            assert http.get("/healthz").status_code == 200, "alive, and not ready"
            refused = http.post("/v1/chat/completions", json=chat_body())
            assert (refused.status_code, bool(refused.headers["retry-after"])) == (503, True)
            slowly.unlink()
            text += b"".join(pieces)
        assert text.endswith(b"data: [DONE]\n\n")
        said = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")]
        content = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in said)
        assert content == "x" * 200, "nothing of it is lost"
        assert process.wait() == 0
