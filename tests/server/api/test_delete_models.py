"""`DELETE /v1/models/{id}`: by the key whose job trained it, at once for new requests, later for running ones."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from api_world import World, chat_body, error_of, lora_folder, open_world
from live_server import live_server
from onebase_server.api import completions, running
from onebase_server.api.caller import LOCAL
from onebase_server.api.models_lookup import to_ref
from onebase_server.api.removal import removed
from onebase_server.api.running import submit_all
from onebase_server.jobs.states import FINE_TUNING, PAUSED, SUCCEEDED
from onebase_server.records.tables import JobRow
from scripted_base import IDENTITY
from stepping import SteppingRunner, wait_until

TUNED = "ft:tiny-base:onebase:bot:12345678"
ADAPTER = "bot-12345678"
ADMIN_KEY = "sk-admin-key-1"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
def world(tmp_path: Path, loop: Any) -> Iterator[World]:
    with open_world(tmp_path, loop, settings={"admin_key": ADMIN_KEY}) as world:
        yield world


def key_of(world: World, name: str, *scopes: str) -> dict[str, str]:
    body = {"name": name, "owner": name, "scopes": scopes or ["inference", "training"]}
    return {"Authorization": f"Bearer {world.post('/admin/keys', body, headers=ADMIN).json()['key']}"}


def train(world: World, owner: str, state: str = SUCCEEDED, checkpoint: bool = False) -> None:
    """As after a fine-tuning job: its row, a checkpoint's version and its own, which its adapter's name serves."""
    row = JobRow(
        id="ftjob-1", kind=FINE_TUNING, owner=owner, adapter=ADAPTER, fine_tuned_model=TUNED, state=state, priority=0,
        created_at=1, request_digest="", model="tiny/base", seed=0, preset="default", hyperparameters={}, recipe={},
        attempt=1, run_open=False, step=1, total_steps=1, result_files=[],
    )  # fmt: skip

    async def add() -> None:
        async with world.deps.durable.database.write() as session:
            session.add(row)

    world.loop.run_until_complete(add())
    if checkpoint:
        publish(world, f"{TUNED}:ckpt-step-10", make_current=False)
    publish(world, TUNED)


def publish(world: World, alias: str, make_current: bool = True) -> None:
    source = lora_folder(world.home.root / "peft")
    world.store.publish(source, ADAPTER, base=IDENTITY, aliases=[alias], make_current=make_current)


def delete(world: World, model: str, headers: dict[str, str]) -> httpx.Response:
    return world.request("DELETE", f"/v1/models/{model}", headers=headers)


def test_the_key_whose_job_trained_a_model_deletes_it_though_it_is_served(world: World) -> None:
    ann = key_of(world, "ann")
    train(world, "ann")
    reply = delete(world, TUNED, ann)
    assert (reply.status_code, reply.json()) == (200, {"id": TUNED, "object": "model", "deleted": True})
    for model in (TUNED, ADAPTER, f"{ADAPTER}@1"):
        assert world.post("/v1/chat/completions", chat_body(model=model), headers=ann).status_code == 404
    assert delete(world, TUNED, ann).status_code == 404


def test_a_checkpoint_stays_a_model_and_does_not_take_the_deleted_one_s_place(world: World) -> None:
    ann = key_of(world, "ann")
    train(world, "ann", checkpoint=True)
    assert delete(world, TUNED, ann).status_code == 200
    ids = [card["id"] for card in world.get("/v1/models", headers=ann).json()["data"]]
    assert ids == ["tiny/base", f"{TUNED}:ckpt-step-10"]
    assert world.post("/v1/chat/completions", chat_body(model=ADAPTER), headers=ann).status_code == 404


def test_other_keys_can_not_delete_it(world: World) -> None:
    train(world, "ann")
    world.publish("everyones")
    bob, reader = key_of(world, "bob"), key_of(world, "ann", "inference")
    assert delete(world, TUNED, bob).status_code == 404
    for model, headers in ((TUNED, reader), ("everyones", bob)):
        refused = delete(world, model, headers)
        assert refused.status_code == 403
        assert error_of(refused)["code"] == "insufficient_permissions"
    assert world.store.resolve(TUNED).id == f"{ADAPTER}@1"
    assert delete(world, TUNED, ADMIN).status_code == 200
    [log] = (world.home.root / "audit").iterdir()
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in told if line["method"] == "DELETE"] == [404, 403, 403, 200]


def test_a_version_that_a_name_serves_stays_until_another_is_served(world: World) -> None:
    for _ in range(2):
        world.publish("everyones")
    refused = delete(world, "everyones@2", ADMIN)
    assert refused.status_code == 409
    assert "everyones@2" in error_of(refused)["message"]
    assert world.post("/admin/adapters/everyones/rollback", headers=ADMIN).status_code == 200
    assert delete(world, "everyones@2", ADMIN).status_code == 200


@pytest.mark.parametrize("model", [TUNED, ADAPTER])
def test_what_a_job_is_to_publish_can_not_be_deleted_yet(world: World, model: str) -> None:
    train(world, "ann", state=PAUSED)
    refused = delete(world, model, ADMIN)
    assert refused.status_code == 409
    assert "ftjob-1" in error_of(refused)["message"]


def test_without_keys_only_the_machine_itself_deletes_what_nobody_trained(tmp_path: Path, loop: Any) -> None:
    with open_world(tmp_path, loop) as world:
        world.publish("everyones")
        train(world, LOCAL.owner)
        world.client = ("192.168.1.5", 50000)
        assert delete(world, "everyones", {}).status_code == 403
        assert delete(world, TUNED, {}).status_code == 200
        world.client = ("127.0.0.1", 50000)
        assert delete(world, "everyones", {}).status_code == 200


def test_running_requests_finish_and_then_slot_and_files_go(tmp_path: Path) -> None:
    runner = SteppingRunner()
    with live_server(tmp_path, runner=runner) as live:
        source = lora_folder(live.settings.home.root / "peft")
        version = live.store.publish(source, ADAPTER, base=IDENTITY, aliases=[TUNED])
        replies: list[httpx.Response] = []
        url = f"{live.url}/v1/chat/completions"
        body = chat_body(model=TUNED, max_tokens=20)
        thread = threading.Thread(target=lambda: replies.append(httpx.post(url, json=body, timeout=None)))
        thread.start()
        runner.steps.release(3)
        wait_until(lambda: live.backend.engine.stats().generated_tokens >= 1)
        assert httpx.delete(f"{live.url}/v1/models/{TUNED}", timeout=None).status_code == 200
        assert httpx.post(url, json=body, timeout=None).status_code == 404
        live.server.deps.store.sweep()  # as the server does every few minutes
        assert version.path.is_dir(), "its request may have to read it again"
        assert version.digest in runner.loaded.values()
        runner.let_go()
        thread.join()
        assert replies[0].json()["choices"][0]["message"]["content"] == "x" * 20
        wait_until(lambda: not version.path.exists() and not runner.loaded)
        assert live.backend.engine.adapters().result() == []


@pytest.mark.parametrize("asked", ["chat/completions", "completions", "responses"])
def test_a_model_deleted_between_look_up_and_queue_is_not_found(
    world: World, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    train(world, LOCAL.owner)

    def delete_first(*args: Any) -> Any:
        world.store.remove(TUNED, force=True)
        return submit_all(*args)

    module = {"chat/completions": running, "completions": completions, "responses": running}[asked]
    monkeypatch.setattr(module, "submit_all", delete_first)
    text = {"chat/completions": chat_body(), "completions": {"prompt": "x"}, "responses": {"input": "x"}}[asked]
    reply = world.post(f"/v1/{asked}", {**text, "model": TUNED}, headers=ADMIN)
    assert reply.status_code == 404
    assert error_of(reply)["code"] == "model_not_found"
    assert f"`{TUNED}`" in error_of(reply)["message"]


def test_a_request_that_waits_keeps_the_files_from_another_process_s_removal(tmp_path: Path) -> None:
    runner = SteppingRunner()
    with live_server(tmp_path, runner=runner) as live:
        source = lora_folder(live.settings.home.root / "peft")
        version = live.store.publish(source, ADAPTER, base=IDENTITY, aliases=[TUNED])
        replies: list[httpx.Response] = []
        url = f"{live.url}/v1/chat/completions"
        body = chat_body(model=TUNED, max_tokens=3)
        thread = threading.Thread(target=lambda: replies.append(httpx.post(url, json=body, timeout=None)))
        thread.start()
        wait_until(lambda: live.backend.engine.stats().num_queued + live.backend.engine.stats().num_running >= 1)
        main = "from onebase_server.cli.main import main; main()"
        command = [sys.executable, "-c", main, "adapters", "rm", ADAPTER]
        subprocess.run([*command, "--home", str(live.settings.home.root)], check=True)
        assert httpx.post(url, json=body, timeout=None).status_code == 404
        live.server.deps.store.sweep()
        assert version.path.is_dir()
        runner.let_go()
        thread.join()
        assert replies[0].json()["choices"][0]["message"]["content"] == "x" * 3

        def is_swept() -> bool:
            live.server.deps.store.sweep()  # as the server does every few minutes
            return not version.path.exists()

        wait_until(is_swept)  # an answer goes out a moment before its request lets go of the files


def test_what_another_process_removes_leaves_memory_once_its_last_request_has_ended(tmp_path: Path) -> None:
    runner = SteppingRunner()
    with live_server(tmp_path, runner=runner) as live:
        live.publish("stays")
        version = live.store.publish(lora_folder(live.settings.home.root / "peft"), ADAPTER, base=IDENTITY)
        engine, deps = live.backend.engine, live.server.deps
        for name in ("stays", ADAPTER):
            engine.preload(to_ref(live.store.resolve(name))).result()
        replies: list[httpx.Response] = []
        url = f"{live.url}/v1/chat/completions"
        body = chat_body(model=ADAPTER, max_tokens=300)
        thread = threading.Thread(target=lambda: replies.append(httpx.post(url, json=body, timeout=None)))
        thread.start()
        runner.steps.release(3)
        wait_until(lambda: engine.stats().generated_tokens >= 1)
        live.store.remove(ADAPTER)  # a store of its own, as another process has
        let_go = deps.durable.supervisor.let_go
        assert let_go is not None
        letting_go = threading.Thread(target=lambda: asyncio.run(cast(Any, let_go())))
        letting_go.start()  # as the server does every few minutes
        while letting_go.is_alive():
            runner.steps.release()  # the engine answers between steps
            letting_go.join(0.02)
        assert httpx.post(url, json=body, timeout=None).status_code == 404
        assert version.digest in runner.loaded.values()
        runner.let_go()
        thread.join()
        assert replies[0].json()["choices"][0]["message"]["content"] == "x" * 300
        wait_until(lambda: [status.ref.name for status in engine.adapters().result()] == ["stays"])
        assert list(runner.loaded.values()) == [live.store.resolve("stays").digest]
        assert live.store.resolve("stays").digest != version.digest


def test_a_version_whose_place_in_the_store_can_not_be_read_is_not_taken_for_removed(world: World) -> None:
    world.publish("damaged")
    refs = [to_ref(world.store.resolve("damaged"))]
    pointer = world.home.adapters / "damaged" / "current.json"
    pointer.write_text("{")
    assert removed(refs, world.store) == []
    pointer.unlink()
    assert removed(refs, world.store) == refs
