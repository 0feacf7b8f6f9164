"""Keys of the table: made, shown once, limited to their scopes and models, revoked while the server runs."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from api_world import World, chat_body, error_of, open_world, with_settings
from onebase.errors import NotReady, Unauthenticated
from onebase_server.api.audit import AuditLog
from onebase_server.api.caller import LOCAL, STATE_KEY, Caller
from onebase_server.api.keys import FRESH_S, STALE_S, KeyOrder, KeyRing, new_key
from onebase_server.records.keys import KeyRecords
from onebase_server.records.tables import KeyRow
from onebase_server.settings import Settings

ADMIN = "sk-admin-key-1"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, loop: Any) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("keyed"), loop, settings={"admin_key": ADMIN}) as world:
        world.publish("pirate")
        world.publish("support")
        world.headers = bearer(ADMIN)
        yield world


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def make(world: World, **order: Any) -> dict[str, Any]:
    reply = world.post("/admin/keys", {"name": "someone", **order})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_a_key_is_shown_once_and_only_its_hash_is_kept(keyed: World) -> None:
    made = make(keyed, name="ann", rpm=5, expires_in=3600)
    assert made["key"].startswith("sk-ob-")
    assert len(made["key"]) >= len("sk-ob-") + 43, "256 bits"
    [listed] = [row for row in keyed.get("/admin/keys").json()["data"] if row["id"] == made["id"]]
    assert {**listed, "key": made["key"]} == {**made, "last_used_at": None}
    secret = made["key"].removeprefix("sk-ob-").encode()
    for path in keyed.home.root.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path


def test_a_key_opens_what_its_scopes_say(keyed: World) -> None:
    doors = {
        "inference": ("POST", "/v1/chat/completions", {"json": chat_body()}),
        "training": ("GET", "/v1/fine_tuning/jobs", {}),
        "admin": ("GET", "/admin/adapters", {}),
    }
    for scopes in (["inference"], ["training"], ["inference", "training"], ["admin"]):
        key = make(keyed, scopes=scopes)["key"]
        for scope, (method, path, options) in doors.items():
            reply = keyed.request(method, path, headers=bearer(key), **options)
            opens = scope in scopes or "admin" in scopes
            assert reply.status_code == (200 if opens else 403), (scopes, scope, reply.text)
            if not opens:
                assert error_of(reply)["code"] == "insufficient_permissions"
                assert scope in error_of(reply)["message"]


def test_a_revoked_key_is_refused_by_the_running_server(keyed: World) -> None:
    made = make(keyed)
    assert keyed.get("/v1/models", headers=bearer(made["key"])).status_code == 200
    revoked = keyed.request("DELETE", f"/admin/keys/{made['id']}").json()
    assert revoked["revoked_at"] is not None
    while keyed.get("/v1/models", headers=bearer(made["key"])).status_code == 200:
        keyed.loop.run_until_complete(asyncio.sleep(FRESH_S / 5))
    assert error_of(keyed.get("/v1/models", headers=bearer(made["key"])))["code"] == "invalid_api_key"
    assert keyed.request("DELETE", f"/admin/keys/{made['id']}").json() == revoked, "again: no change"
    assert keyed.request("DELETE", "/admin/keys/key_nobody").status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes[0]"),
        ({"name": "x", "rpm": 0}, "rpm"),
        ({"name": "x", "expires_in": 1}, "expires_in"),
        ({"name": "x", "owner": "../etc"}, "owner"),
        ({"name": "x", "limit": 3}, "limit"),
    ],
    ids=str,
)
def test_a_wrong_order_is_refused_by_field(keyed: World, body: dict[str, Any], param: str) -> None:
    assert error_of(keyed.post("/admin/keys", body))["param"] == param


def test_a_list_of_models_hides_all_others(keyed: World) -> None:
    key = make(keyed, models=["pirate"])["key"]
    listed = keyed.get("/v1/models", headers=bearer(key)).json()["data"]
    assert [card["id"] for card in listed] == ["pirate"]
    for model, status in [("pirate", 200), ("pirate@1", 200), ("support", 404), ("support@1", 404), ("tiny/base", 404)]:
        reply = keyed.post("/v1/chat/completions", chat_body(model=model), headers=bearer(key))
        assert reply.status_code == status, model
        assert keyed.get(f"/v1/models/{model}", headers=bearer(key)).status_code == status, model
    near = error_of(keyed.post("/v1/chat/completions", chat_body(model="suport"), headers=bearer(key)))["message"]
    assert "support" not in near.replace("suport", ""), "a near name would tell what else is there"
    assert "support" in error_of(keyed.post("/v1/chat/completions", chat_body(model="suport")))["message"]


def test_the_last_use_is_noted(keyed: World) -> None:
    made = make(keyed)
    keyed.get("/v1/models", headers=bearer(made["key"]))
    while True:
        [row] = [row for row in keyed.get("/admin/keys").json()["data"] if row["id"] == made["id"]]
        if row["last_used_at"] is not None:
            break
    assert row["last_used_at"] >= made["created_at"]


def test_every_admin_call_is_in_the_audit_log_refused_ones_too(keyed: World) -> None:
    made = make(keyed)
    keyed.get("/admin/adapters", headers=bearer(made["key"]))
    keyed.get("/admin/adapters", headers={})
    lines = [
        json.loads(line) for path in (keyed.home.root / "audit").iterdir() for line in path.read_text().splitlines()
    ]
    told = [(line["key"], line["method"], line["path"], line["status"]) for line in lines[-3:]]
    admin = lines[-3]["key"]
    assert admin.startswith("key-")
    assert told == [
        (admin, "POST", "/admin/keys", 200),
        (made["id"], "GET", "/admin/adapters", 403),
        (None, "GET", "/admin/adapters", 401),
    ]
    assert lines[-3]["target"] == f"{made['id']} (inference) of {made['owner']}"
    assert made["key"] not in "".join(map(str, lines))
    assert ADMIN not in "".join(map(str, lines))


def test_what_an_admin_chose_is_in_the_audit_log(keyed: World) -> None:
    for _ in range(2):
        keyed.publish("audited")
    for path, body in (("publish", {"weights": {"1": 0.25, "2": 0.75}}), ("publish", {"version": 1}), ("rollback", {})):
        assert keyed.post(f"/admin/adapters/audited/{path}", body, headers=bearer(ADMIN)).status_code == 200
    lines = [
        json.loads(line) for path in (keyed.home.root / "audit").iterdir() for line in path.read_text().splitlines()
    ]
    assert [line["target"] for line in lines[-3:]] == ["@1 25%, @2 75%", "@1 100%", "@1, @2"]


def test_refusals_are_counted_in_the_audit_log_and_do_not_fill_it(tmp_path: Path, loop: Any) -> None:
    clock = Clock()
    log = AuditLog(tmp_path / "audit", clock=clock)
    handler = SimpleNamespace(opt={"scope": "admin"})

    def call(caller: Caller | None, status: int = 401) -> None:
        state = {} if caller is None else {STATE_KEY: caller}
        scope: Any = {"state": state, "route_handler": handler, "method": "GET", "path": "/admin/keys"}
        loop.run_until_complete(log.note({"type": "http.response.start", "status": status, "headers": []}, scope))

    for _ in range(1000):
        call(None)
    call(LOCAL, 200)
    clock.now += 61
    call(None)
    [path] = (tmp_path / "audit").iterdir()
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(told) == 60 + 1 + 1 + 1
    assert told[60]["key"] == "local", "who may is always written down"
    assert (told[61]["action"], told[61]["count"]) == ("more calls refused", 940)


# The ring alone, with its own clock and a table that can be away


class Table(KeyRecords):
    """Rows in a dict; `away` makes it unreachable."""

    def __init__(self, *rows: KeyRow) -> None:
        self.rows = {row.hash: row for row in rows}
        self.away = False
        self.asked = 0

    async def by_hash(self, digest: str) -> KeyRow | None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise OperationalError("SELECT", {}, Exception("gone"))
        return self.rows.get(digest)

    async def any(self) -> bool:
        if self.away:
            raise OperationalError("SELECT", {}, Exception("gone"))
        return bool(self.rows)

    def note_use(self, key_id: str, now: int) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ring_over(table: Table, clock: Clock, **settings: Any) -> KeyRing:
    given = Settings(home=None, **settings)  # type: ignore[arg-type]  # the ring reads keys and limits only
    return KeyRing(given, table, now=clock, clock=clock)


def whose(loop: Any, ring: KeyRing, key: str | None) -> Any:
    return loop.run_until_complete(ring.identify(None if key is None else f"Bearer {key}"))


def test_a_server_without_keys_asks_for_none_and_one_that_ever_had_some_always_does(loop: Any) -> None:
    clock, table = Clock(), Table()
    ring = ring_over(table, clock)
    assert whose(loop, ring, None).is_admin
    row, key = new_key(KeyOrder("ann"), 1000)
    table.rows[row.hash] = row
    clock.now += FRESH_S
    with pytest.raises(Unauthenticated):
        whose(loop, ring, None)
    row.revoked_at = 1001
    clock.now += FRESH_S
    for asked in (None, key):
        with pytest.raises(Unauthenticated):
            whose(loop, ring, asked)


def test_an_expired_key_says_so(loop: Any) -> None:
    clock = Clock()
    row, key = new_key(KeyOrder("ann", expires_in=60), 1000)
    ring = ring_over(Table(row), clock)
    assert whose(loop, ring, key).owner == row.id
    clock.now += 60
    with pytest.raises(Unauthenticated, match="expired"):
        whose(loop, ring, key)


def test_while_the_database_is_away_only_keys_that_it_just_vouched_for_get_in(loop: Any) -> None:
    clock = Clock()
    row, key = new_key(KeyOrder("ann"), 1000)
    table = Table(row)
    ring = ring_over(table, clock, api_keys=("sk-from-the-environment",))
    assert whose(loop, ring, key).id == row.id
    table.away = True
    clock.now += STALE_S - 1
    assert whose(loop, ring, key).id == row.id
    assert whose(loop, ring, "sk-from-the-environment").scopes == {"inference", "training"}
    with pytest.raises(NotReady):
        whose(loop, ring, "sk-ob-never-seen")
    clock.now += 2
    with pytest.raises(NotReady):
        whose(loop, ring, key)
    table.away = False
    assert whose(loop, ring, key).id == row.id


def test_keys_that_were_not_used_for_a_minute_are_not_remembered(loop: Any) -> None:
    clock, table = Clock(), Table()
    ring = ring_over(table, clock)
    for index in range(200):
        row, key = new_key(KeyOrder(f"job-{index}"), 1000)
        table.rows[row.hash] = row
        clock.now += 1.0
        assert whose(loop, ring, key).id == row.id
        with pytest.raises(Unauthenticated):
            whose(loop, ring, f"sk-ob-wrong-{index}")
    assert len(ring._cache) <= 2 * STALE_S
    assert len(ring._noted) <= 60


def test_the_table_is_asked_once_for_a_burst_even_of_wrong_keys(loop: Any) -> None:
    clock, table = Clock(), Table(new_key(KeyOrder("ann"), 1000)[0])
    ring = ring_over(table, clock)
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            whose(loop, ring, "sk-wrong")
    assert table.asked == 1


def test_the_table_is_asked_once_for_requests_that_come_together(loop: Any) -> None:
    row, key = new_key(KeyOrder("ann"), 1000)
    table = Table(row)
    ring = ring_over(table, Clock())

    async def burst() -> list[Caller]:
        return await asyncio.gather(*(ring.identify(f"Bearer {key}") for _ in range(8)))

    assert {caller.id for caller in loop.run_until_complete(burst())} == {row.id}
    assert table.asked == 1


def test_an_admin_key_can_be_made_from_the_table_alone(tmp_path: Path, loop: Any) -> None:
    with open_world(tmp_path, loop) as world:
        key = make(world, scopes=["admin"])["key"]
        locked = with_settings(world)
        assert locked.get("/admin/keys").status_code == 401
        assert locked.get("/admin/keys", headers=bearer(key)).status_code == 200


@pytest.fixture(scope="module")
def near(shared_world: World) -> World:
    return with_settings(shared_world, cors_origins=("https://ours.example",))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1"}, 200),
        ({"Origin": "https://ours.example"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ],
    ids=str,
)
def test_without_keys_a_web_page_of_others_can_not_call(near: World, headers: dict[str, str], status: int) -> None:
    assert near.get("/admin/adapters", headers=headers).status_code == status


def test_settings_give_limits_to_keys_that_have_none(loop: Any) -> None:
    clock = Clock()
    rows = [new_key(KeyOrder("ann"), 1000), new_key(KeyOrder("bob"), 1000)]
    rows[1][0].rpm = 7
    ring = ring_over(Table(*(row for row, _ in rows)), clock, key_rpm=3, key_parallel=2, admin_key=ADMIN)
    assert [whose(loop, ring, key).limits.rpm for _, key in rows] == [3, 7]
    assert [whose(loop, ring, key).limits.parallel for _, key in rows] == [2, 2]
    assert whose(loop, ring, ADMIN).limits.rpm is None
    assert replace(whose(loop, ring, ADMIN)).is_admin


# The table is asked ahead of need


def ring_in_haste(table: Table, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> KeyRing:
    ring = ring_over(table, clock)
    monkeypatch.setattr(ring._fresh, "_every_s", 0.001)
    return ring


async def until(reached: Callable[[], bool]) -> None:
    while not reached():
        await asyncio.sleep(0.001)


def test_a_request_after_a_quiet_moment_asks_the_table_nothing(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        row, key = new_key(KeyOrder("ann"), 1000)
        table, clock = Table(row), Clock()
        ring = ring_in_haste(table, clock, monkeypatch)
        await ring.open()
        await ring.identify(f"Bearer {key}")
        clock.now += 0.9 * FRESH_S
        count = table.asked
        await until(lambda: table.asked > count + 1)
        await ring.close()
        count = table.asked
        clock.now += 0.9 * FRESH_S
        assert (await ring.identify(f"Bearer {key}")).id == row.id
        assert table.asked == count

    loop.run_until_complete(scenario())


def test_a_key_revoked_in_a_quiet_moment_is_refused(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        row, key = new_key(KeyOrder("ann"), 1000)
        table, clock = Table(row), Clock()
        ring = ring_in_haste(table, clock, monkeypatch)
        await ring.open()
        await ring.identify(f"Bearer {key}")
        table.rows[row.hash] = new_key(KeyOrder("ann"), 1000)[0]
        count = table.asked
        await until(lambda: table.asked > count + 1)
        with pytest.raises(Unauthenticated):  # although the clock stands still
            await ring.identify(f"Bearer {key}")
        await ring.close()

    loop.run_until_complete(scenario())


def test_a_server_learns_in_a_quiet_moment_that_its_first_key_was_made(
    loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        table, clock = Table(), Clock()
        ring = ring_in_haste(table, clock, monkeypatch)
        await ring.open()
        assert (await ring.identify(None)).is_admin
        row, _ = new_key(KeyOrder("ann"), 1000)
        table.rows[row.hash] = row
        await until(lambda: ring._locked)
        with pytest.raises(Unauthenticated):
            await ring.identify(None)
        await ring.close()

    loop.run_until_complete(scenario())
