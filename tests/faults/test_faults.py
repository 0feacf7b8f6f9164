"""The fault table of docs/faults.md, row by row: what breaks, what goes on, and what is whole afterwards."""

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_world import World, chat_body, error_of, open_world, settled_stats, with_settings
from fakes import FakeRunner
from live_server import live_server
from onebase.store import AdapterStore
from onebase_server.engine.runner import DeviceLost
from onebase_server.jobs.assembly import DurableConfig, assemble
from onebase_server.jobs.process import RunCommand
from postgres_server import postgres

pytestmark = pytest.mark.slow
LINE = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}).encode()


def upload(world: World, data: bytes = LINE + b"\n", name: str = "t.jsonl") -> httpx.Response:
    return world.request("POST", "/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file of this process can grow past `size` bytes, as on a disk that is full by then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_refuses_what_must_be_stored_serves_on_and_leaves_no_halves(world: World) -> None:
    before = contents(world.home.files)
    with disk_with_room_for(200_000):
        reply = upload(world, LINE + b"\n" + b" " * 2_000_000 + b"\n")
        assert (reply.status_code, error_of(reply)["type"]) == (503, "server_error")
        assert "disk is full" in error_of(reply)["message"]
        assert reply.headers["retry-after"]
        assert contents(world.home.files) == before
        assert world.chat(model="pirate").status_code == 200
        assert world.chat(model="pirate", stream=True).status_code == 200
    assert upload(world).status_code == 200


def test_full_disk_for_the_database_serves_on_and_stores_again_when_there_is_room(world: World) -> None:
    size = (world.home.root / "onebase.db").stat().st_size
    with disk_with_room_for(size // 2):
        replies = [world.chat(store=True, messages=[{"role": "user", "content": "x" * 200}]) for _ in range(30)]
        assert {reply.status_code for reply in replies} == {200}, "an answer is never lost for want of its record"
        assert upload(world).status_code in (200, 503)
    assert world.chat(store=True).status_code == 200
    assert upload(world).status_code == 200
    assert world.get("/v1/files").status_code == 200


def test_a_log_of_admin_calls_that_can_not_be_written_does_not_stop_the_admin(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    (world.home.root / "audit").write_text("in the way")
    assert world.get("/admin/adapters").status_code == 200
    assert "the audit log" in caplog.text
    assert "/admin/adapters" in caplog.text, "what could not be written there is in the server's own log"


def damage(path: Path) -> bytes:
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    return before


def test_a_corrupted_manifest_takes_down_its_version_only(world: World) -> None:
    version = world.store.resolve("pirate")
    before = damage(version.path / "onebase.json")
    assert world.chat(model="pirate").status_code == 200, "a server that has read it goes on"
    restarted = with_settings(replace(world, deps=replace(world.deps, store=AdapterStore(world.home.adapters))))
    reply = restarted.chat(model="pirate")
    assert reply.status_code in (400, 404, 503), reply.text
    assert str(world.home.root) not in error_of(reply)["message"]
    assert restarted.chat(model="support").status_code == 200
    assert restarted.chat().status_code == 200
    listed = restarted.get("/v1/models")
    assert listed.status_code == 200, listed.text
    assert "support" in listed.text
    (version.path / "onebase.json").write_bytes(before)
    assert restarted.chat(model="pirate").status_code == 200


def test_weights_that_can_not_be_read_fail_their_own_requests_until_they_can(world: World) -> None:
    version = world.store.resolve("pirate")
    world.runner.broken.add(version.digest)
    for _ in range(2):
        reply = world.chat(model="pirate")
        assert reply.status_code == 400
        assert error_of(reply)["code"] == "invalid_adapter"
        assert str(world.home.root) not in reply.text
    assert world.chat(model="support").status_code == 200
    world.runner.broken.clear()
    while world.chat(model="pirate").status_code != 200:
        time.sleep(0.05)  # a failure is remembered for two seconds


def test_a_corrupted_database_stops_what_needs_it_and_not_the_serving(world: World) -> None:
    upload(world)
    for name in ("onebase.db", "onebase.db-wal"):
        path = world.home.root / name
        if path.exists():
            path.write_bytes(b"\xde\xad\xbe\xef" * (path.stat().st_size // 4))
    # connections of its own: pages that are in memory would hide the damage
    durable = assemble(world.home, world.store, RunCommand(program=("false",)), DurableConfig())
    broken = with_settings(replace(world, deps=replace(world.deps, durable=durable)))
    try:
        reply = broken.get("/v1/files")
        assert reply.status_code == 503
        assert "database" in error_of(reply)["message"]
        assert str(world.home.root) not in reply.text
        assert "onebase_database_up 0.0" in broken.get("/metrics").text
        keyed = with_settings(broken, api_keys=("sk-inference-1",))
        keyed.headers = {"Authorization": "Bearer sk-inference-1"}
        assert keyed.chat().status_code == 200, "keys of the environment need no table"
    finally:
        world.loop.run_until_complete(durable.database.close())


def test_memory_that_runs_out_in_a_step_fails_that_step_only(world: World) -> None:
    world.runner.fail_next = MemoryError("12 GB could not be had")
    reply = world.chat()
    assert reply.status_code == 500
    assert "12 GB" not in reply.text
    assert world.chat().status_code == 200
    stats = settled_stats(world)
    assert (stats.num_running, stats.pages_held, stats.num_failed_steps) == (0, 0, 1)


def test_a_lost_device_ends_the_process_so_that_a_new_one_can_start(tmp_path: Path) -> None:
    runner = FakeRunner(reply=lambda digest, prompt: [ord("x")] * 5)
    with live_server(tmp_path, runner=runner) as live:
        runner.fail_next = DeviceLost("an illegal access")
        with suppress(httpx.TransportError):
            reply = httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(), timeout=None)
            assert reply.status_code in (500, 503)
        live.server.ended.wait()
        assert live.server.failed, "exit code 1"


@pytest.mark.parametrize("step_s", [-86_400 * 400, 86_400 * 400])
def test_a_clock_that_steps_stops_nothing(world: World, monkeypatch: pytest.MonkeyPatch, step_s: int) -> None:
    before = world.get("/v1/files").json()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step_s)
    assert world.chat(model="pirate").status_code == 200
    assert world.chat(stream=True).status_code == 200
    assert upload(world).status_code == 200
    assert len(world.get("/v1/files").json()["data"]) == len(before["data"]) + 1
    assert world.get("/readyz").status_code == 200


class Wire:
    """A Unix socket before PostgreSQL's own, that can be cut and mended."""

    def __init__(self, url: str, folder: Path) -> None:
        self._real = url.rpartition("host=")[2] + "/.s.PGSQL.5432"
        self.url = f"postgresql://onebase@/postgres?host={folder}"
        self._pairs: list[socket.socket] = []
        self._is_cut = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._is_cut = True
        for conn in self._pairs:
            with suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    near.close()
                    continue
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._real)
                self._pairs += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with closing(source), suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def test_postgresql_that_goes_and_comes_back_is_missed_only_while_it_is_away(loop: Any) -> None:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="onebase-wire-", dir="/tmp"))  # a socket's path has to be short
    with postgres() as url, closing(Wire(url, folder)) as wire:
        settings = {"database": wire.url, "api_keys": ("sk-inference-1",), "admin_key": "sk-admin-key-1"}
        with open_world(folder / "w", loop, settings=settings) as world:
            world.headers = {"Authorization": "Bearer sk-admin-key-1"}
            made = world.post("/admin/keys", {"name": "ann"}).json()["key"]
            file_id = upload(world).json()["id"]
            ann = {"Authorization": f"Bearer {made}"}
            assert world.post("/v1/chat/completions", chat_body(), headers=ann).status_code == 200
            wire.cut()
            assert world.chat().status_code == 200
            assert world.post("/v1/chat/completions", chat_body(), headers=ann).status_code == 200
            assert world.chat(store=True).status_code == 200
            reply = world.get("/v1/files")
            assert (reply.status_code, "database" in error_of(reply)["message"]) == (503, True)
            assert world.get("/v1/models", headers={"Authorization": "Bearer sk-ob-unknown"}).status_code == 503
            wire.mend()
            assert world.get(f"/v1/files/{file_id}").status_code == 200
            assert upload(world).status_code == 200
            assert world.get("/v1/models", headers={"Authorization": "Bearer sk-ob-unknown"}).status_code == 401
