"""The clients that we ship, run as their users run them, against a real server over loopback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from api_world import BASE
from live_server import Live, live_server
from node_example import run_example

CLIENTS = Path(__file__).parents[2] / "clients"
sys.path.insert(0, str(CLIENTS / "python"))

from onebase_client import Onebase  # noqa: E402  (a distribution of its own, not installed)
from onebase_client import chat as chat_command  # noqa: E402


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("clients")) as live:
        live.publish("pirate")
        live.publish("pirate")
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[Onebase]:
    with Onebase(base_url=f"{live.url}/v1", max_retries=0) as client:
        yield client


def environment(live: Live) -> dict[str, str]:
    return {**os.environ, "ONEBASE_URL": f"{live.url}/v1"}


def test_python_is_openais_client(client: Onebase) -> None:
    reply = client.chat.completions.create(model="pirate", messages=[{"role": "user", "content": "Hi"}])
    assert reply.choices[0].message.content == "pirate@2 says: Hello there."


def test_python_moves_versions(client: Onebase) -> None:
    assert [adapter.name for adapter in client.server.adapters()] == ["pirate"]
    assert client.server.adapter("pirate").current == "pirate@2"
    assert client.server.rollback("pirate").current == "pirate@1"
    split = client.server.publish("pirate", {1: 0.25, 2: 0.75})
    assert [(each.version, each.share) for each in split.serving] == [(1, 0.25), (2, 0.75)]
    assert client.server.publish("pirate", 2).current == "pirate@2"
    assert client.server.preload("pirate", 1).versions[0].place in ("host", "slot")
    assert client.server.pin("pirate").versions[1].pinned
    assert not client.server.unpin("pirate").versions[1].pinned
    client.server.unload("pirate", 1)


def test_python_shows_where_models_are(client: Onebase) -> None:
    client.server.preload("pirate", 1)
    client.server.pin("pirate", 2)
    base, *cards = client.server.models(versions=True)
    assert (base.id, base.parent, base.residency) == (BASE, None, None)
    assert [card.id for card in cards] == ["pirate", "pirate@1", "pirate@2"]
    assert {card.parent for card in cards} == {BASE}
    assert {card.residency for card in cards} <= {"device", "host"}
    client.server.unpin("pirate", 2)
    assert [card.id for card in client.server.models()] == [BASE, "pirate"]


def test_python_errors_are_openais(client: Onebase) -> None:
    with pytest.raises(openai.NotFoundError):
        client.server.adapter("nobody")
    with pytest.raises(openai.NotFoundError):
        client.server.run("run-none")
    with pytest.raises(openai.BadRequestError) as caught:
        client.server.retrain(adapter="pirate", dataset="missing.jsonl", from_="current")
    assert caught.value.param == "dataset"


def test_python_schedules_retrainings(client: Onebase) -> None:
    made = client.server.create_schedule(
        "pirate", cron="0 3 * * *", timezone="Europe/Berlin", stored_chats=True, from_="current", gate=True
    )
    assert made.retrain == {"stored_chats": True, "from": "current", "gate": True, "preset": "default"}
    assert client.server.create_schedule("pirate", every="6h", stored_chats=True).every == "6h"
    first, second = client.server.schedules()
    assert (first.id, first.last_run, second.cron) == (made.id, None, None)
    assert [client.server.delete_schedule(each.id).deleted for each in (first, second)] == [True, True]
    assert client.server.schedules() == []
    with pytest.raises(openai.BadRequestError) as caught:
        client.server.create_schedule("pirate", cron="at night", stored_chats=True)
    assert caught.value.param == "cron"


def test_python_makes_and_revokes_keys(tmp_path: Path) -> None:
    """On a server of its own: from the first key on, a server lets nobody in without one."""
    with live_server(tmp_path) as live, Onebase(base_url=f"{live.url}/v1", max_retries=0) as client:
        keys(client)


def keys(client: Onebase) -> None:
    made = client.server.create_key("ann", scopes=("inference", "admin"), rpm=60)
    assert made.key
    assert made.rpm == 60
    [listed] = client.server.keys()
    assert (listed.id, listed.name, listed.revoked_at) == (made.id, "ann", None)
    with Onebase(base_url=str(client.base_url), api_key=made.key) as ann:
        assert ann.models.list().data[0].id == BASE
        assert ann.server.revoke_key(made.id).revoked_at is not None


def test_the_chat_command_lists_and_answers(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{live.url}/v1"
    assert chat_command.main(["--url", url]) == 0
    assert capsys.readouterr().out == f"{BASE}\npirate\n"
    assert chat_command.main(["pirate", "Hi", "--url", url, "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "pirate@2 says: Hello there.\n"
    assert chat_command.main(["nobody", "Hi", "--url", url]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_importing_the_client_loads_no_part_of_the_server() -> None:
    code = "import onebase_client, sys; print([m for m in ('torch', 'onebase', 'litestar') if m in sys.modules])"
    path = {**os.environ, "PYTHONPATH": str(CLIENTS / "python")}
    out = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(live: Live) -> None:
    script = str(CLIENTS / "curl/chat.sh")
    out = subprocess.run(["sh", script, "pirate"], env=environment(live), capture_output=True, text=True, check=True)
    assert '"content":"pirate@2 says: Hello there."' in out.stdout
    assert out.stdout.rstrip().endswith("data: [DONE]")
    script = str(CLIENTS / "curl/admin.sh")
    out = subprocess.run(["sh", script, "pirate"], env=environment(live), capture_output=True, text=True, check=True)
    before, rolled_back, after = (json.loads(line)["serving"] for line in out.stdout.splitlines())
    assert rolled_back != before
    assert after == [{"version": 2, "share": 1.0}]


@pytest.mark.slow
def test_node(live: Live, tmp_path: Path) -> None:
    out = run_example(tmp_path, "chat.mjs", "pirate", ONEBASE_URL=f"{live.url}/v1")
    assert out.returncode == 0, out.stdout + out.stderr
    lines = out.stdout.splitlines()
    assert lines == [
        f"models: {BASE}, pirate",
        "reply: pirate@2 says: Hello there.",
        "stream: pirate@2 says: Hello there.",
        "finish: stop",
        "error: 404 model_not_found",
    ]
