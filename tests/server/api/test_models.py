"""`/v1/models`: what is listed, found by any spelling that clients send, and what is left of a deleted one."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_world import BASE, World, chat_body, error_of
from live_server import live_server
from onebase_server.api.schemas_models import ModelCard
from stepping import SteppingRunner, wait_until


def test_the_list_has_the_base_and_every_adapter(world: World) -> None:
    body = world.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == [BASE, "pirate", "support"]
    for card in body["data"]:
        ModelCard.model_validate(card)
        assert (card["object"], card["owned_by"]) == ("model", "onebase")
        assert isinstance(card["created"], int)


def fill_slots(world: World, names: list[str]) -> None:
    for name in names:
        world.publish(name)
        assert world.chat(model=name).status_code == 200


def test_an_adapters_parent_is_the_base(world: World) -> None:
    base, pirate, _ = world.get("/v1/models").json()["data"]
    assert (base["parent"], base["root"], base["version"]) == (None, BASE, None)
    assert (pirate["parent"], pirate["root"], pirate["version"]) == (BASE, BASE, 2)


def test_an_adapter_s_residency_is_where_its_version_is(own_world: World) -> None:
    for _ in range(2):
        own_world.publish("pirate")
    engine = own_world.deps.backend.get().engine
    assert own_world.chat(model="pirate@2").status_code == 200  # it has a slot now
    listed = own_world.get("/v1/models?versions=true").json()["data"]
    assert [(card["id"], card["residency"]) for card in listed] == [
        (BASE, None), ("pirate", "device"), ("pirate@1", "disk"), ("pirate@2", "device"),
    ]  # fmt: skip
    assert own_world.get("/v1/models/pirate@1").json()["residency"] == "disk"
    assert own_world.get(f"/v1/models/{BASE}").json()["residency"] is None
    fill_slots(own_world, ["a", "b", "c", "d", "e", "f", "g", "h"])
    assert engine.adapters().result()[0].ref.id == "pirate@2"
    assert own_world.get("/v1/models/pirate").json()["residency"] == "host"


def test_the_list_does_not_wait_for_a_step_that_runs(tmp_path: Path) -> None:
    runner = SteppingRunner()
    with live_server(tmp_path, runner=runner) as live:
        live.publish("pirate")
        waits = threading.Thread(
            target=lambda: httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(), timeout=None)
        )
        waits.start()
        wait_until(lambda: live.backend.engine.stats().num_running == 1)
        cards = httpx.get(f"{live.url}/v1/models", timeout=None).json()["data"]
        assert [card["residency"] for card in cards] == [None, "disk"]
        runner.let_go()
        waits.join()


def test_versions_are_listed_on_request(world: World) -> None:
    ids = [card["id"] for card in world.get("/v1/models?versions=true").json()["data"]]
    assert ids == [BASE, "pirate", "pirate@1", "pirate@2", "support", "support@1"]


def test_created_does_not_change_between_calls(world: World) -> None:
    first, second = (world.get("/v1/models").json()["data"] for _ in range(2))
    assert [card["created"] for card in first] == [card["created"] for card in second]


@pytest.mark.parametrize("path", ["pirate", "pirate@1", "tiny/base", "tiny%2Fbase", "pirate%401"])
def test_a_model_is_found_by_its_id_however_it_is_quoted(world: World, path: str) -> None:
    reply = world.get(f"/v1/models/{path}")
    assert reply.status_code == 200
    assert reply.json()["id"] == path.replace("%2F", "/").replace("%40", "@")


@pytest.mark.parametrize("path", ["ft:tiny:org:pirate:abc", "ft%3Atiny%3Aorg%3Apirate%3Aabc"])
def test_an_alias_with_colons_is_a_model(own_world: World, path: str) -> None:
    own_world.publish("pirate")
    own_world.store.set_alias("ft:tiny:org:pirate:abc", "pirate@1")
    assert own_world.get(f"/v1/models/{path}").json()["id"] == "ft:tiny:org:pirate:abc"
    assert own_world.chat(model="ft:tiny:org:pirate:abc").json()["model"] == "ft:tiny:org:pirate:abc"
    assert "ft:tiny:org:pirate:abc" in [card["id"] for card in own_world.get("/v1/models").json()["data"]]


@pytest.mark.parametrize("path", ["nobody", "pirate@9", "a/b/c", "..%2F..%2Fetc", "x" * 500])
def test_an_unknown_id_is_404(world: World, path: str) -> None:
    reply = world.get(f"/v1/models/{path}")
    assert reply.status_code == 404
    assert error_of(reply)["code"] == "model_not_found"


def test_a_deleted_adapter_is_gone_from_list_and_chat(own_world: World) -> None:
    own_world.publish("pirate")
    reply = own_world.request("DELETE", "/v1/models/pirate")
    assert (reply.status_code, reply.json()) == (200, {"id": "pirate", "object": "model", "deleted": True})
    assert [card["id"] for card in own_world.get("/v1/models").json()["data"]] == [BASE]
    assert own_world.chat(model="pirate").status_code == 404
    assert own_world.request("DELETE", "/v1/models/pirate").status_code == 404


@pytest.mark.parametrize(("path", "left"), [("pirate@1", ["pirate@2"]), ("ft:one", ["pirate@2"]), ("pirate", [])])
def test_deleted_versions_leave_the_engine_s_memory_too(own_world: World, path: str, left: list[str]) -> None:
    for _ in range(2):
        own_world.publish("pirate")
    own_world.store.set_alias("ft:one", "pirate@1")
    for model in ("pirate@1", "pirate@2"):
        assert own_world.chat(model=model).status_code == 200
    assert own_world.request("DELETE", f"/v1/models/{path}").status_code == 200
    known = own_world.deps.backend.get().engine.adapters().result()
    assert [status.ref.id for status in known] == left


@pytest.mark.parametrize("path", ["tiny/base", "tiny%2Fbase"])
def test_the_base_cannot_be_deleted(world: World, path: str) -> None:
    reply = world.request("DELETE", f"/v1/models/{path}")
    assert reply.status_code == 403
    assert error_of(reply)["type"] == "invalid_request_error"


def test_a_version_published_meanwhile_is_served_at_once(own_world: World) -> None:
    def answer() -> Any:
        return own_world.chat(model="pirate").json()["choices"][0]["message"]["content"]

    own_world.publish("pirate")
    assert answer().startswith("pirate@1")
    own_world.publish("pirate")
    assert answer().startswith("pirate@2")
    own_world.store.rollback("pirate")
    assert answer().startswith("pirate@1")
