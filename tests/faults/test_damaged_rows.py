"""One row of the database is damaged: it costs itself, and nothing else."""

import asyncio
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from api_world import World, chat_body, error_of, with_settings
from onebase_server.jobs.stored_chats import training_line
from onebase_server.records.tables import ChatRow

pytestmark = pytest.mark.slow
ADMIN = {"Authorization": "Bearer sk-admin-key-1"}


def spoil(world: World, table: str, column: str, row_id: str) -> None:
    """While the server goes on: a write that it is in the middle of would keep the file locked."""

    def write() -> None:
        with closing(sqlite3.connect(world.home.root / "onebase.db", timeout=600)) as database:
            changed = database.execute(f"UPDATE {table} SET {column} = '{{\"half' WHERE id = ?", (row_id,))
            assert changed.rowcount == 1
            database.commit()

    world.loop.run_until_complete(asyncio.to_thread(write))


def make_key(server: World, **order: Any) -> dict[str, Any]:
    return dict(server.post("/admin/keys", {"name": "ann", **order}, headers=ADMIN).json())


@pytest.mark.parametrize("column", ["scopes", "models"])
def test_a_damaged_key_opens_nothing_and_others_go_on(world: World, column: str) -> None:
    server = with_settings(world, admin_key="sk-admin-key-1")
    damaged, whole = (make_key(server, models=["tiny/base"]) for _ in range(2))
    spoil(world, "keys", column, damaged["id"])
    status = {}
    for made in (damaged, whole):
        headers = {"Authorization": f"Bearer {made['key']}"}
        status[made["id"]] = server.post("/v1/chat/completions", chat_body(), headers=headers).status_code
    assert status == {damaged["id"]: 403 if column == "scopes" else 404, whole["id"]: 200}
    assert {key["id"] for key in server.get("/admin/keys", headers=ADMIN).json()["data"]} >= set(status)
    assert server.request("DELETE", f"/admin/keys/{damaged['id']}", headers=ADMIN).status_code == 200


def test_a_damaged_chat_is_left_out_and_others_are_listed(world: World) -> None:
    ids = [world.chat(store=True).json()["id"] for _ in range(3)]
    spoil(world, "stored_chats", "response", ids[1])
    listed = world.get("/v1/chat/completions?order=asc")
    assert [chat["id"] for chat in listed.json()["data"]] == [ids[0], ids[2]]
    reply = world.get(f"/v1/chat/completions/{ids[1]}")
    assert reply.status_code == 404
    assert "damaged" in error_of(reply)["message"]
    assert world.get(f"/v1/chat/completions/{ids[1]}/messages").status_code == 404
    assert world.request("DELETE", f"/v1/chat/completions/{ids[1]}").status_code == 200


@pytest.mark.parametrize("cursor", ["the last chat's id", "last_id"])
def test_pages_go_on_behind_damaged_chats(world: World, cursor: str) -> None:
    ids = [world.chat(store=True).json()["id"] for _ in range(7)]
    for chat_id in (ids[0], ids[1], ids[3], ids[4], ids[5]):
        spoil(world, "stored_chats", "response", chat_id)
    seen: list[str] = []
    after, has_more = "", True
    while has_more:
        page = world.get(f"/v1/chat/completions?limit=2{after}").json()
        seen += [chat["id"] for chat in page["data"]]
        has_more = page["has_more"]
        assert page["data"], "which OpenAI's clients take for the end, and go on after the last one in it"
        after = f"&after={page['last_id'] if cursor == 'last_id' else page['data'][-1]['id']}"
    assert seen == [ids[2], ids[6]]
    spoil(world, "stored_chats", "response", ids[6])
    end = world.get(f"/v1/chat/completions?after={ids[2]}").json()
    assert (end["data"], end["last_id"], end["has_more"]) == ([], ids[6], False)


def test_nothing_is_learnt_from_a_damaged_chat() -> None:
    answer = {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": "Yes"}}]}
    asked = {"messages": [{"role": "user", "content": "Really?"}]}
    assert training_line(ChatRow(request=asked, response=answer)) is not None
    assert training_line(ChatRow(request={}, response=answer)) is None
    assert training_line(ChatRow(request=asked, response={})) is None


@pytest.mark.parametrize("column", ["hyperparameters", "recipe", "result_files"])
def test_a_damaged_job_does_not_stop_the_others(world: World, column: str) -> None:
    lines = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n' * 12
    upload = world.request("POST", "/v1/files", files={"file": ("t.jsonl", lines)}, data={"purpose": "fine-tune"})
    asked = {"model": "tiny/base", "training_file": upload.json()["id"]}

    def order() -> str:
        return str(world.post("/v1/fine_tuning/jobs", asked).json()["id"])

    damaged, other = order(), order()
    spoil(world, "jobs", column, damaged)
    ended: set[str] = set()
    while other not in ended:
        jobs = world.get("/v1/fine_tuning/jobs").json()["data"]
        ended = {job["id"] for job in jobs if job["status"] in ("succeeded", "failed")}
    assert world.get(f"/v1/fine_tuning/jobs/{damaged}").status_code == 200
    assert world.post(f"/v1/fine_tuning/jobs/{damaged}/cancel").status_code in (200, 400, 409)
