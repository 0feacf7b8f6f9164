"""`/admin/schedules` over HTTP: made, shown, carried out by the running server, removed."""

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import fake_trainer
from api_world import World, error_of, open_world


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    root = tmp_path_factory.mktemp("schedules")
    (root / "plan.json").write_text("{}")
    with open_world(root, loop, trainer=(sys.executable, fake_trainer.__file__, str(root / "plan.json"))) as world:
        (world.home.root / "datasets/nightly").mkdir(parents=True)
        (world.home.root / "datasets/nightly/monday.jsonl").write_text("{}\n")
        yield world


def make(server: World, **fields: Any) -> Any:
    body = {"adapter": "pirate", "cron": "0 3 * * *", "retrain": {"dataset": "nightly"}, **fields}
    return server.post("/admin/schedules", {name: value for name, value in body.items() if value is not None})


def listed(server: World) -> list[dict[str, Any]]:
    return list(server.get("/admin/schedules").json()["data"])


def test_a_schedule_is_made_shown_and_removed(server: World) -> None:
    made = make(server, timezone="Europe/Berlin", retrain={"dataset": "nightly", "hyperparameters": {"epochs": 1}})
    assert made.status_code == 200, made.text
    schedule = made.json()
    assert (schedule["object"], schedule["cron"], schedule["every"]) == ("schedule", "0 3 * * *", None)
    assert schedule["retrain"] == {"dataset": "nightly", "preset": "default", "hyperparameters": {"epochs": 1.0}}
    assert (schedule["last_at"], schedule["last_run"], schedule["last_state"], schedule["note"]) == (None,) * 4
    assert schedule["next_at"] > schedule["created_at"]
    assert listed(server) == [schedule]
    deleted = server.request("DELETE", f"/admin/schedules/{schedule['id']}")
    assert deleted.json() == {"id": schedule["id"], "object": "schedule", "deleted": True}
    assert listed(server) == []
    again = server.request("DELETE", f"/admin/schedules/{schedule['id']}")
    assert (again.status_code, error_of(again)["param"]) == (404, "id")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"cron": "at night"}, "cron"),
        ({"cron": None}, "cron"),
        ({"every": "6h"}, "cron"),
        ({"cron": None, "every": "6 hours"}, "every"),
        ({"timezone": "Moon/Tycho"}, "timezone"),
        ({"adapter": "Not A Name"}, "adapter"),
        ({"retrain": None}, "retrain"),
        ({"retrain": {}}, "retrain.dataset"),
        ({"retrain": {"dataset": "../nightly"}}, "retrain.dataset"),
        ({"retrain": {"dataset": "nightly", "stored_chats": True}}, "retrain.dataset"),
        ({"retrain": {"dataset": "nightly", "from": "current"}}, "retrain.from"),
        ({"retrain": {"dataset": "nightly", "hyperparameters": {"epochs": 0}}}, "retrain.hyperparameters.epochs"),
        ({"retrain": {"dataset": "nightly", "epochs": 3}}, "retrain.epochs"),
        ({"weekly": True}, "weekly"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_refused_by_field_and_not_kept(server: World, fields: dict[str, Any], param: str) -> None:
    reply = make(server, **fields)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param), reply.text
    assert listed(server) == []


@pytest.mark.slow
def test_a_running_server_retrains_by_its_schedule(server: World) -> None:
    schedule = make(server, cron=None, every="1d").json()  # once: it is not to come again before it has been looked at

    async def move() -> None:  # the clock is the machine's here, so the schedule's time is moved to the past
        [kept] = await server.deps.durable.scheduler.records.list()
        await server.deps.durable.scheduler.records.advance(kept, next_at=1)

    server.loop.run_until_complete(move())
    while listed(server)[0]["last_state"] != "succeeded":
        server.loop.run_until_complete(asyncio.sleep(0.02))
    shown = listed(server)[0]
    assert shown["next_at"] > schedule["created_at"]
    run = server.get(f"/admin/retrain/{shown['last_run']}").json()
    assert (run["version"], run["dataset"]) == ("pirate@1", str(server.home.root / "datasets/nightly"))
    assert server.chat(model="pirate").json()["choices"][0]["message"]["content"].startswith("pirate@1")
