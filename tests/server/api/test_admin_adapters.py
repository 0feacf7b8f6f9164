"""`/admin/adapters`: what is published and where it is; names move between versions while requests run."""

from collections.abc import Iterator
from typing import Any

import pytest

from api_world import World, error_of, open_world


@pytest.fixture
def versions(tmp_path: Any, loop: Any) -> Iterator[World]:
    with open_world(tmp_path, loop) as world:
        for _ in range(3):
            world.publish("pirate")
        yield world


def card(world: World) -> dict[str, Any]:
    reply = world.get("/admin/adapters/pirate")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def answer(world: World, model: str = "pirate") -> str:
    return str(world.chat(model=model).json()["choices"][0]["message"]["content"])


def test_every_version_is_listed_with_its_place(versions: World) -> None:
    [listed] = versions.get("/admin/adapters").json()["data"]
    assert listed == card(versions)
    assert (listed["name"], listed["current"]) == ("pirate", "pirate@3")
    assert [each["place"] for each in listed["versions"]] == ["disk", "disk", "disk"]
    answer(versions)
    served = card(versions)["versions"][2]
    assert (served["place"], served["leases"], served["loads"], served["misses"]) == ("slot", 0, 1, 1)
    assert served["last_used"] is not None


def test_a_roll_back_serves_what_was_served_before(versions: World) -> None:
    reply = versions.post("/admin/adapters/pirate/rollback")
    assert (reply.status_code, reply.json()["current"]) == (200, "pirate@2")
    assert answer(versions).startswith("pirate@2")
    versions.post("/admin/adapters/pirate/rollback", {"version": 3})
    assert answer(versions).startswith("pirate@3")


def test_publishing_serves_one_version_or_splits_the_traffic(versions: World) -> None:
    assert versions.post("/admin/adapters/pirate/publish", {"version": 1}).json()["current"] == "pirate@1"
    split = versions.post("/admin/adapters/pirate/publish", {"weights": {"1": 3, "2": 1}}).json()
    assert split["serving"] == [{"version": 1, "share": 0.75}, {"version": 2, "share": 0.25}]
    answers = {answer(versions).split()[0] for _ in range(60)}
    assert answers == {"pirate@1", "pirate@2"}


def test_a_version_is_loaded_before_it_is_published(versions: World) -> None:
    answer(versions)
    body = versions.post("/admin/adapters/pirate/publish", {"weights": {"1": 1, "2": 1}}).json()
    assert [each["place"] for each in body["versions"]] == ["slot", "slot", "slot"]
    body = versions.post("/admin/adapters/pirate/rollback", {"version": 3}).json()
    assert (body["current"], [each["loads"] for each in body["versions"]]) == ("pirate@3", [1, 1, 1])


@pytest.mark.parametrize("verb", ["publish", "rollback"])
def test_a_version_that_can_not_be_loaded_is_never_served_under_the_name(versions: World, verb: str) -> None:
    versions.runner.broken.add(versions.store.resolve("pirate@1").digest)
    reply = versions.post(f"/admin/adapters/pirate/{verb}", {"version": 1})
    assert reply.status_code == 400
    assert "pirate@1 is broken" in error_of(reply)["message"]
    assert card(versions)["current"] == "pirate@3"
    assert answer(versions).startswith("pirate@3")


@pytest.mark.parametrize("verb", ["preload", "pin"])
def test_a_version_can_be_brought_near_ahead_of_its_first_request(versions: World, verb: str) -> None:
    body = versions.post(f"/admin/adapters/pirate/{verb}", {"version": 2}).json()
    assert body["versions"][1]["place"] in ("host", "slot")
    assert body["versions"][1]["pinned"] is (verb == "pin")
    assert body["versions"][2]["place"] == "disk"


def test_a_pin_can_be_taken_back_and_memory_freed(versions: World) -> None:
    versions.post("/admin/adapters/pirate/pin")
    assert versions.post("/admin/adapters/pirate/unpin").json()["versions"][2]["pinned"] is False
    versions.post("/admin/adapters/pirate/unload")
    while card(versions)["versions"][2]["place"] != "disk":
        pass
    assert answer(versions).startswith("pirate@3"), "and it comes back when it is asked for"


REFUSED: list[tuple[str, Any, int, str]] = [
    ("/admin/adapters/nobody/rollback", {}, 404, "model_not_found"),
    ("/admin/adapters/nobody/publish", {"version": 1}, 404, "model_not_found"),
    ("/admin/adapters/nobody/preload", {}, 404, "model_not_found"),
    ("/admin/adapters/No Such/pin", {}, 404, "model_not_found"),
    ("/admin/adapters/pirate/preload", {"version": 9}, 404, "model_not_found"),
    ("/admin/adapters/pirate/rollback", {"version": 0}, 400, "integer_below_min_value"),
    ("/admin/adapters/pirate/rollback", {"to": 1}, 400, "unknown_parameter"),
    ("/admin/adapters/pirate/publish", {}, 400, "invalid_value"),
    ("/admin/adapters/pirate/publish", {"version": 1, "weights": {"1": 1}}, 400, "invalid_value"),
    ("/admin/adapters/pirate/publish", {"weights": {}}, 400, "invalid_value"),
    ("/admin/adapters/pirate/publish", {"weights": {"one": 1}}, 400, "invalid_value"),
    ("/admin/adapters/pirate/publish", {"weights": {"1": 0}}, 400, "decimal_below_min_value"),
]


@pytest.mark.parametrize(("path", "body", "status", "code"), REFUSED, ids=range(len(REFUSED)))
def test_a_wrong_order_is_refused(world: World, path: str, body: Any, status: int, code: str) -> None:
    reply = world.post(path, body)
    assert (reply.status_code, error_of(reply)["code"]) == (status, code), reply.text


@pytest.mark.parametrize("path", ["rollback", "publish"])
def test_a_version_that_is_not_there_cannot_be_served(world: World, path: str) -> None:
    reply = world.post(f"/admin/adapters/pirate/{path}", {"version": 9})
    assert reply.status_code == 400
    assert "does not exist" in error_of(reply)["message"]


def test_a_broken_version_cannot_be_preloaded(versions: World) -> None:
    versions.runner.broken.add(versions.store.resolve("pirate").digest)
    reply = versions.post("/admin/adapters/pirate/preload")
    assert (reply.status_code, error_of(reply)["code"]) == (400, "invalid_adapter")
