"""Two keys beside one another: whatever one makes, the other can neither see, name, change nor learn to exist.

`DECISIONS` says for every route of the app how it is kept apart. A new route without a decision fails here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar.handlers import HTTPRouteHandler

from api_world import World, chat_body, lora_folder, open_world
from onebase.home import Home
from onebase_server.compose import build_app
from onebase_server.settings import Settings
from scripted_base import IDENTITY

OPEN = "needs no key, holds nobody's data"
ADMIN = "needs the admin scope"
TRAINED = "needs the key whose job trained it, or the admin scope: test_delete_models.py"
LIST = "shows the caller's own only"
OWN = "names one thing of the caller's by its id"
MODEL = "names a model in its path"
ASKS = "names a model, and perhaps earlier answers, in its body"
REFERS = "names things of the caller's in its body"
MAKES = "makes something new, and names nothing"

DECISIONS = {
    "getHealth": OPEN,
    "getReadiness": OPEN,
    "getMetrics": OPEN,
    "createChatCompletion": ASKS,
    "createCompletion": ASKS,
    "createResponse": ASKS,
    "getResponse": OWN,
    "deleteResponse": OWN,
    "listInputItems": OWN,
    "listModels": LIST,
    "retrieveModel": MODEL,
    "deleteModel": TRAINED,
    "createFile": MAKES,
    "listFiles": LIST,
    "retrieveFile": OWN,
    "downloadFile": OWN,
    "deleteFile": OWN,
    "createFineTuningJob": REFERS,
    "listFineTuningJobs": LIST,
    "retrieveFineTuningJob": OWN,
    "cancelFineTuningJob": OWN,
    "pauseFineTuningJob": OWN,
    "resumeFineTuningJob": OWN,
    "listFineTuningEvents": OWN,
    "listFineTuningJobCheckpoints": OWN,
    "listChatCompletions": LIST,
    "getChatCompletion": OWN,
    "updateChatCompletion": OWN,
    "deleteChatCompletion": OWN,
    "getChatCompletionMessages": OWN,
    "createFeedback": REFERS,
}
ADMIN_KEY = "sk-admin-key-1"


@dataclass(frozen=True)
class Route:
    operation: str
    method: str
    path: str


def all_routes() -> list[Route]:
    app = build_app(Settings(home=Home(Path("/nowhere"))))  # nothing is opened before a start
    found = []
    for route in app.routes:
        for handler in getattr(route, "route_handlers", ()):
            if isinstance(handler, HTTPRouteHandler) and handler.operation_id is not None:
                methods = sorted(handler.http_methods - {"HEAD", "OPTIONS"})
                found += [Route(str(handler.operation_id), method, route.path) for method in methods]
    return found


ROUTES = all_routes()


def decision_of(route: Route) -> str | None:
    return ADMIN if route.path.startswith("/admin/") else DECISIONS.get(route.operation)


def routes_with(*decisions: str) -> pytest.MarkDecorator:
    chosen = sorted((route for route in ROUTES if decision_of(route) in decisions), key=lambda route: route.operation)
    return pytest.mark.parametrize("route", chosen, ids=lambda route: route.operation)


@dataclass
class Tenant:
    """One key, and everything that it has made."""

    headers: dict[str, str]
    secret: str
    ids: dict[str, str]
    adapter: str
    model: str


def test_every_route_has_a_decision_about_isolation() -> None:
    assert [route for route in ROUTES if decision_of(route) is None] == []
    assert set(DECISIONS) - {route.operation for route in ROUTES} == set(), "these are gone"
    assert len(ROUTES) > 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("tenants"), loop, settings={"admin_key": ADMIN_KEY}) as world:
        world.publish("everyones")
        yield world


@pytest.fixture(scope="module")
def tenants(world: World) -> list[Tenant]:
    return [make_tenant(world, name) for name in ("ann", "bob")]


@pytest.fixture(params=[(0, 1), (1, 0)], ids=["ann of bob", "bob of ann"])
def pair(request: pytest.FixtureRequest, tenants: list[Tenant]) -> tuple[Tenant, Tenant]:
    """(who asks, whose it is)"""
    first, second = request.param
    return tenants[first], tenants[second]


def make_tenant(world: World, name: str) -> Tenant:
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    body = {"name": name, "scopes": ["inference", "training"]}
    headers = {"Authorization": f"Bearer {world.post('/admin/keys', body, headers=admin).json()['key']}"}
    secret = f"the secret of {name}"
    lines = [{"messages": [{"role": "user", "content": secret}, {"role": "assistant", "content": "Yes"}]}] * 10
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    upload = {"files": {"file": (f"{name}.jsonl", data)}, "data": {"purpose": "fine-tune"}, "headers": headers}
    file_id = ok(world.request("POST", "/v1/files", **upload))["id"]
    asked = {"model": "tiny/base", "training_file": file_id, "suffix": name, "metadata": {"of": name}}
    job_id = ok(world.post("/v1/fine_tuning/jobs", asked, headers=headers))["id"]
    row = world.loop.run_until_complete(world.deps.jobs.get(job_id, None))
    tuned = str(row.fine_tuned_model)
    world.store.publish(lora_folder(world.home.root / "peft"), row.adapter, base=IDENTITY, aliases=[tuned])
    said = {"messages": [{"role": "user", "content": secret}], "store": True, "metadata": {"of": name}}
    chat_id = ok(world.post("/v1/chat/completions", chat_body(**said), headers=headers))["id"]
    response = ok(world.post("/v1/responses", {"model": "tiny/base", "input": secret}, headers=headers))["id"]
    ids = {"file_id": file_id, "job_id": job_id, "chat_id": chat_id, "completion_id": chat_id, "response_id": response}
    return Tenant(headers, secret, ids, row.adapter, tuned)


def ok(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def ask(world: World, route: Route, who: dict[str, str], ids: dict[str, str], **options: Any) -> httpx.Response:
    path = route.path
    for name, value in ids.items():
        path = path.replace(f"{{{name}:str}}", value).replace(f"{{{name}:path}}", value).replace(f"{{{name}}}", value)
    assert "{" not in path, f"what is this route's id? {route.path}"
    if route.operation == "updateChatCompletion":
        options = {"json": {"metadata": {"changed": "yes"}}}
    return world.request(route.method, path, headers=who, **options)


@routes_with(ADMIN, TRAINED)
def test_admin_routes_are_closed_to_other_keys(world: World, tenants: list[Tenant], route: Route) -> None:
    ids = {"name": "everyones", "model_id": "everyones", "run_id": "run-1", "key_id": "key_1", "version": "1"}
    ids["schedule_id"] = "sched-1"
    assert ask(world, route, tenants[0].headers, ids).status_code == 403
    assert ask(world, route, {}, ids).status_code == 401


@routes_with(OWN, LIST, MODEL, ASKS, REFERS, MAKES)
def test_all_other_routes_need_a_key(world: World, tenants: list[Tenant], route: Route) -> None:
    ids = {**tenants[0].ids, "model_id": "everyones"}
    assert ask(world, route, {}, ids).status_code == 401
    assert ask(world, route, {"Authorization": "Bearer sk-ob-wrong"}, ids).status_code == 401


@routes_with(OWN)
def test_anothers_thing_looks_like_one_that_is_not_there(world: World, pair: Any, route: Route) -> None:
    asks, owns = pair
    unknown = {name: value[:-6] + "000000" for name, value in owns.ids.items()}
    real, made_up = ask(world, route, asks.headers, owns.ids), ask(world, route, asks.headers, unknown)
    assert real.status_code == made_up.status_code == 404, real.text
    same = made_up.text
    for name in owns.ids:
        same = same.replace(unknown[name], owns.ids[name])
    assert real.text == same


@routes_with(LIST)
def test_a_list_shows_nothing_of_anothers(world: World, pair: Any, route: Route) -> None:
    asks, owns = pair
    text = ask(world, route, asks.headers, {}).text
    for theirs in (*owns.ids.values(), owns.secret, owns.adapter, owns.model):
        assert theirs not in text
    own = {"listFiles": "file_id", "listFineTuningJobs": "job_id", "listChatCompletions": "chat_id"}
    assert (asks.ids[own[route.operation]] if route.operation in own else asks.adapter) in text


@routes_with(LIST)
def test_a_list_can_not_be_paged_from_anothers_item(world: World, pair: Any, route: Route) -> None:
    asks, owns = pair
    for theirs in owns.ids.values():
        reply = ask(world, route, asks.headers, {}, params={"after": theirs})
        assert route.operation == "listModels" or reply.status_code == 400


@routes_with(MODEL, ASKS)
def test_anothers_adapter_is_an_unknown_model(world: World, pair: Any, route: Route) -> None:
    asks, owns = pair
    bodies = {
        "createChatCompletion": lambda model: chat_body(model=model),
        "createCompletion": lambda model: {"model": model, "prompt": "Once"},
        "createResponse": lambda model: {"model": model, "input": "Hi"},
    }

    def call(tenant: Tenant, model: str) -> httpx.Response:
        body = bodies[route.operation](model) if route.operation in bodies else None
        return ask(world, route, tenant.headers, {"model_id": model}, **({"json": body} if body else {}))

    for model in (owns.adapter, f"{owns.adapter}@1", owns.model):
        assert call(owns, model).status_code == 200
        refused = call(asks, model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert refused.text == call(asks, model + "0").text.replace(model + "0", model), "unknown in the same words"
    for model in ("everyones", asks.adapter, "tiny/base"):
        assert call(asks, model).status_code == 200


def test_a_job_can_not_be_made_from_anothers_file_or_model(world: World, pair: Any) -> None:
    asks, owns = pair
    for body in (
        {"model": "tiny/base", "training_file": owns.ids["file_id"]},
        {"model": "tiny/base", "training_file": asks.ids["file_id"], "validation_file": owns.ids["file_id"]},
        {"model": owns.adapter, "training_file": asks.ids["file_id"]},
        {"model": owns.model, "training_file": asks.ids["file_id"]},
    ):
        reply = world.post("/v1/fine_tuning/jobs", body, headers=asks.headers)
        assert reply.status_code in (400, 404), reply.text


def test_anothers_chat_can_not_be_judged_and_anothers_answer_not_continued(world: World, pair: Any) -> None:
    asks, owns = pair
    feedback = {"completion_id": owns.ids["chat_id"], "rating": "bad"}
    assert world.post("/v1/feedback", feedback, headers=asks.headers).status_code == 404
    goes_on = {"model": "tiny/base", "input": "Go on", "previous_response_id": owns.ids["response_id"]}
    assert world.post("/v1/responses", goes_on, headers=asks.headers).status_code == 400


def test_an_idempotency_key_of_another_is_ones_own_first_use(world: World, pair: Any) -> None:
    asks, owns = pair
    made = {}
    for tenant in (owns, asks):
        body = {"model": "tiny/base", "training_file": tenant.ids["file_id"]}
        headers = {**tenant.headers, "Idempotency-Key": f"one-{owns.adapter}"}
        made[tenant.secret] = ok(world.post("/v1/fine_tuning/jobs", body, headers=headers))["id"]
    assert len(set(made.values())) == 2


def test_afterwards_everything_of_both_is_still_theirs(world: World, tenants: list[Tenant]) -> None:
    for tenant in tenants:
        assert tenant.secret in world.get(f"/v1/files/{tenant.ids['file_id']}/content", headers=tenant.headers).text
        chat = ok(world.get(f"/v1/chat/completions/{tenant.ids['chat_id']}", headers=tenant.headers))
        assert "changed" not in chat["metadata"]
        assert ok(world.get(f"/v1/responses/{tenant.ids['response_id']}", headers=tenant.headers))


def test_what_was_computed_of_anothers_prompt_is_not_counted_as_cached(world: World, pair: Any) -> None:
    me, other = pair
    said = [{"role": "user", "content": me.secret[::-1] * 10}]  # its first page is nobody else's

    def cached(tenant: Tenant) -> int:
        reply = ok(world.post("/v1/chat/completions", chat_body(messages=said), headers=tenant.headers))
        return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached(me)
    assert cached(me) > 0
    assert cached(other) == 0


def test_two_keys_of_one_owner_share_everything(world: World, tenants: list[Tenant]) -> None:
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    [row] = [row for row in ok(world.get("/admin/keys", headers=admin))["data"] if row["name"] == "ann"]
    body = {"name": "ann's next", "owner": row["owner"], "scopes": ["inference", "training"]}
    new = {"Authorization": f"Bearer {ok(world.post('/admin/keys', body, headers=admin))['key']}"}
    ann = tenants[0]
    assert ok(world.get(f"/v1/files/{ann.ids['file_id']}", headers=new))
    assert world.post("/v1/chat/completions", chat_body(model=ann.adapter), headers=new).status_code == 200


def test_an_adapter_whose_trainer_is_not_on_record_is_shown_to_admins_only(world: World, tenants: list[Tenant]) -> None:
    """As after the loss of the database: who trained it can't be told, so nobody gets it by default."""
    world.store.publish(
        lora_folder(world.home.root / "peft"), "orphan", base=IDENTITY, aliases=["ft:tiny-base:onebase::0rphan00"]
    )
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert world.post("/v1/chat/completions", chat_body(model="orphan"), headers=tenants[0].headers).status_code == 404
    assert world.post("/v1/chat/completions", chat_body(model="orphan"), headers=admin).status_code == 200


def test_an_adapter_of_everyone_stays_everyones_when_it_is_trained_on(world: World, tenants: list[Tenant]) -> None:
    """Nobody had trained it when a key first asked, and that was remembered."""
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    world.publish("shared")
    body = chat_body(model="shared")
    assert world.post("/v1/chat/completions", body, headers=tenants[0].headers).status_code == 200
    (world.home.root / "datasets" / "shared.jsonl").parent.mkdir(exist_ok=True)
    (world.home.root / "datasets" / "shared.jsonl").write_text('{"text": "x"}\n')
    ok(world.post("/admin/retrain", {"adapter": "shared", "dataset": "shared.jsonl"}, headers=admin))
    source = lora_folder(world.home.root / "peft")
    world.store.publish(source, "shared", base=IDENTITY, aliases=["ft:tiny-base:onebase:shared:12345678"])
    assert world.post("/v1/chat/completions", body, headers=tenants[0].headers).status_code == 200
