"""What one key may fill and hold: files, adapters, and a generation's time."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest

from api_world import World, chat_body, error_of, lora_folder, open_world, settled_stats, with_settings
from onebase_server.engine.runner import StepBatch, StepResult
from onebase_server.records.overview import file_bytes_of
from scripted_base import IDENTITY

KEYS = ("sk-inference-1", "sk-inference-2")
LINES = "".join(
    json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}) + "\n"
    for _ in range(10)
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Any:
    with open_world(tmp_path_factory.mktemp("quota"), loop) as world:
        yield world


def keyed(world: World, **settings: Any) -> World:
    return with_settings(world, **{"api_keys": KEYS, **settings})


def upload(world: World, size: int, key: str = KEYS[0]) -> Any:
    content = LINES.encode() + b"\n" * max(0, size - len(LINES))
    headers = {"Authorization": f"Bearer {key}"}
    files = {"file": ("t.jsonl", content)}
    return world.request("POST", "/v1/files", files=files, data={"purpose": "fine-tune"}, headers=headers)


def test_files_of_a_key_fit_into_its_quota_and_deleting_makes_room(shared: World) -> None:
    world = keyed(shared, file_quota_mb=1)
    first = upload(world, 600_000)
    assert first.status_code == 200
    before = set(world.home.files.iterdir())
    refused = upload(world, 600_000)
    assert refused.status_code == 403
    assert error_of(refused)["code"] == "storage_quota_exceeded"
    assert set(world.home.files.iterdir()) == before
    assert upload(world, 600_000, KEYS[1]).status_code == 200, "another's files don't count"
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    world.request("DELETE", f"/v1/files/{first.json()['id']}", headers=headers)
    assert upload(world, 600_000).status_code == 200


def test_uploads_at_the_same_time_do_not_both_get_what_is_left(shared: World) -> None:
    world = keyed(shared, file_quota_mb=2)
    headers = {"Authorization": f"Bearer {KEYS[1]}"}
    for card in world.get("/v1/files", headers=headers).json()["data"]:
        world.request("DELETE", f"/v1/files/{card['id']}", headers=headers)
    content = LINES.encode() + b"\n" * 1_400_000

    async def both() -> list[int]:
        transport = httpx.ASGITransport(cast(Any, world.app), client=world.client)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as http:
            files = {"file": ("t.jsonl", content)}
            sent = [http.post("/v1/files", files=files, data={"purpose": "fine-tune"}) for _ in range(3)]
            return sorted([reply.status_code for reply in await asyncio.gather(*sent)])

    before = set(world.home.files.iterdir())
    assert world.loop.run_until_complete(both()) == [200, 403, 403]
    assert len(set(world.home.files.iterdir()) - before) == 1
    assert world.deps.uploads._owners == {}
    assert upload(world, 500_000, KEYS[1]).status_code == 200, "what was refused takes no room"


def test_a_file_that_is_kept_while_another_upload_begins_counts_against_it(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = keyed(shared, file_quota_mb=2, api_keys=("sk-inference-3",))
    headers = {"Authorization": "Bearer sk-inference-3"}
    form = {"files": {"file": ("t.jsonl", LINES.encode() + b"\n" * 1_400_000)}, "data": {"purpose": "fine-tune"}}
    has_read, may_go_on = asyncio.Event(), asyncio.Event()

    async def read_slowly(database: Any, owner: str) -> int:
        stored = await file_bytes_of(database, owner)
        if not has_read.is_set():
            has_read.set()
            await may_go_on.wait()
        return stored

    async def both() -> list[int]:
        transport = httpx.ASGITransport(cast(Any, world.app), client=world.client)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as http:
            slow = asyncio.create_task(http.post("/v1/files", **form))
            await has_read.wait()
            quick = await http.post("/v1/files", **form)
            may_go_on.set()
            return [quick.status_code, (await slow).status_code]

    monkeypatch.setattr("onebase_server.api.quota.file_bytes_of", read_slowly)
    before = set(world.home.files.iterdir())
    assert world.loop.run_until_complete(both()) == [200, 403]
    assert len(set(world.home.files.iterdir()) - before) == 1, "and nothing of the refused one stays on the disk"


def test_an_upload_is_refused_as_soon_as_it_is_too_much(shared: World) -> None:
    world = keyed(shared, file_quota_mb=3)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        while sent < 100_000_000:
            sent += 500_000
            yield b"x" * 500_000

    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "multipart/form-data; boundary=b"}
    reply = world.request("POST", "/v1/files", content=endless(), headers=headers)
    assert (reply.status_code, error_of(reply)["code"]) == (403, "storage_quota_exceeded")
    assert not list(world.home.files.glob("*.part"))


def test_a_key_whose_adapters_fill_its_quota_makes_no_further_job(shared: World) -> None:
    world = keyed(shared, adapter_quota_mb=1)
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    body = {"model": "tiny/base", "training_file": upload(world, 1000).json()["id"]}
    made = world.post("/v1/fine_tuning/jobs", body, headers=headers)
    assert made.status_code == 200
    row = world.loop.run_until_complete(world.deps.jobs.get(made.json()["id"], None))
    version = world.store.publish(lora_folder(world.home.root / "peft"), row.adapter, base=IDENTITY)
    (version.path / "filler").write_bytes(b"\0" * 1_000_000)
    refused = world.post("/v1/fine_tuning/jobs", body, headers=headers)
    assert (refused.status_code, error_of(refused)["code"]) == (403, "storage_quota_exceeded")
    other = {"Authorization": f"Bearer {KEYS[1]}"}
    body = {"model": "tiny/base", "training_file": upload(world, 1000, KEYS[1]).json()["id"]}
    assert world.post("/v1/fine_tuning/jobs", body, headers=other).status_code == 200


def test_a_generation_ends_at_its_deadline(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = with_settings(shared, max_request_s=0.05)
    real = world.runner.run

    def slow(batch: StepBatch) -> StepResult:
        time.sleep(0.02)
        return real(batch)

    monkeypatch.setattr(world.runner, "run", slow)
    shared.says = "x" * 300
    reply = world.post("/v1/chat/completions", chat_body())
    assert (reply.status_code, error_of(reply)["code"]) == (503, "deadline_exceeded")
    assert settled_stats(world).num_running == 0
