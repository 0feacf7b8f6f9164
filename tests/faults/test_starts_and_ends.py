"""Starts that can't succeed and ends that are asked for twice or too early: words, exit codes, nothing half-done."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from api_world import chat_body, lora_folder
from onebase.home import Home
from onebase.store import AdapterStore
from scripted_base import IDENTITY
from server_process import LINE, ROOT, server

pytestmark = pytest.mark.slow
ONE_SIGNAL_S = 0.5
"""Two signals in so short a time are one (http_server.py)."""


@contextmanager
def serving(home: Path, how: str, port: int = 0) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join(str(ROOT / part) for part in ("core", "server", "training", "tests"))
    env = {**os.environ, "PYTHONPATH": path, "ONEBASE_HOME": str(home), "ONEBASE_PORT": str(port)}
    command = [sys.executable, str(ROOT / "tests" / "serving_process.py"), how]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def until_said(process: subprocess.Popen[str], words: str) -> str:
    """The log up to the line with these words; all of it if the process ends first."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            break
    return said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_base_is_still_loading_ends_it_well_and_at_once(tmp_path: Path, number: int) -> None:
    with serving(tmp_path / "home", "stuck") as process:
        said = until_said(process, "loading the base")
        url = said.rpartition("listening at ")[2].partition(";")[0]
        assert httpx.get(f"{url}/readyz", timeout=None).status_code == 503
        process.send_signal(number)
        rest = process.communicate()[1]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest


def test_a_port_that_is_taken_is_said_before_anything_is_begun(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with serving(tmp_path / "home", "", port) as process:
            said = process.communicate()[1]
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in said
    assert "ONEBASE_PORT" in said
    assert "Traceback" not in said


def newer(home: Path) -> None:
    home.mkdir()
    (home / "version").write_text("99\n")


def damaged(home: Path) -> None:
    Home(home).create()
    (home / "onebase.db").write_bytes(b"no database at all" * 100)


def spoilt_base(home: Path) -> None:
    (home.parent / "base").mkdir()
    (home.parent / "base" / "config.json").write_text("{")


def in_the_way(home: Path) -> None:
    home.write_text("a file")


REFUSALS: list[tuple[str, Callable[[Path], None] | None, list[str], list[str]]] = [
    ("open to others", None, ["--host", "0.0.0.0"], ["onebase keys create", "--allow-no-keys"]),
    ("no such address", None, ["--host", "203.0.113.5", "--allow-no-keys"], ["can't listen on", "ONEBASE_HOST"]),
    ("a newer home", newer, [], ["of version 99", "install the newer onebase again"]),
    ("a file for a home", in_the_way, [], ["can't be written to", "ONEBASE_HOME"]),
    ("a home that can't be made", None, ["--home", "/proc/nowhere"], ["/proc/nowhere can't be written to"]),
    ("a damaged database", damaged, [], ["onebase.db can't be used", "restore a backup"]),
    ("no base", None, ["--base", "/nowhere/model"], ["no base '/nowhere/model'", "onebase base ls"]),
    ("a spoilt base", spoilt_base, ["--base", "{home}/../base"], ["config.json does not parse"]),
    ("no hub", None, ["--base", "no-such/model"], ["the hub can't be reached", "--base PATH"]),
]


@pytest.mark.parametrize(
    ("prepare", "words", "told"), [each[1:] for each in REFUSALS], ids=[each[0] for each in REFUSALS]
)
def test_a_start_that_can_not_succeed_says_why_and_what_to_do(
    tmp_path: Path, prepare: Callable[[Path], None] | None, words: list[str], told: list[str]
) -> None:
    home = tmp_path / "home"
    if prepare is not None:
        prepare(home)
    path = os.pathsep.join(str(ROOT / part) for part in ("core", "server", "training"))
    given = {name: value for name, value in os.environ.items() if not name.startswith("ONEBASE_")}
    env = {**given, "PYTHONPATH": path, "ONEBASE_HOME": str(home), "ONEBASE_PORT": "0", "HF_HUB_OFFLINE": "1"}
    start = [sys.executable, "-c", "from onebase_server.cli.main import main; main()", "serve"]
    command = [*start, *(word.format(home=home) for word in words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert [each for each in told if each not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_said_before_a_base_is_fetched(tmp_path: Path) -> None:
    with serving(tmp_path / "home", "no disk") as process:
        said = process.communicate()[1]
    assert process.returncode == 1
    assert "has 1 MB left" in said, said
    assert "free some" in said


def test_a_base_that_does_not_fit_in_memory_ends_the_server_with_words(tmp_path: Path) -> None:
    with serving(tmp_path / "home", "no memory") as process:
        said = process.communicate()[1]
    assert process.returncode == 1
    assert "memory ran out" in said, said
    assert "ONEBASE_KV_TOKENS" in said


def test_a_second_sigterm_ends_what_still_runs(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    (home.root / "slowly").touch()
    with server(home) as (process, http):
        body = chat_body(stream=True, max_tokens=400)
        with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            pieces = stream.iter_raw()
            text = next(pieces)
            process.send_signal(signal.SIGTERM)
            while http.get("/readyz").status_code == 200:  # until it has heard the first
                pass
            time.sleep(ONE_SIGNAL_S + 0.1)
            assert process.poll() is None, "the first lets it finish"
            process.send_signal(signal.SIGTERM)
            text += b"".join(pieces)
        assert process.wait() == 0
    assert b"The server is shutting down" in text
    assert b"[DONE]" not in text


def test_two_servers_on_one_home_see_each_others_work_and_the_one_left_takes_over(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    (home.root / "datasets").mkdir()
    (home.root / "datasets" / "p.jsonl").write_text(LINE * 12)
    order = {"adapter": "bot", "dataset": "p.jsonl"}
    with server(home) as (first_process, first), server(home) as (_, second):
        AdapterStore(home.adapters).publish(lora_folder(tmp_path / "peft"), "pirate", base=IDENTITY)
        file = {"file": ("t.jsonl", LINE.encode() * 10)}
        file_id = first.post("/v1/files", files=file, data={"purpose": "fine-tune"}).json()["id"]
        made = second.post("/admin/keys", json={"name": "ann"}).json()["key"]
        for http in (first, second):
            assert http.get(f"/v1/files/{file_id}/content").content == LINE.encode() * 10
            headers = {"Authorization": f"Bearer {made}"}
            body = chat_body(model="pirate", max_tokens=2)
            assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        runs = [http.post("/admin/retrain", json=order).json()["id"] for http in (first, second)]
        assert [ended(second, run) for run in runs] == ["succeeded", "succeeded"]
        assert [version.version for entry in AdapterStore(home.adapters).list() for version in entry.versions
                if entry.name == "bot"] == [1, 2], "each run was carried out once"  # fmt: skip
        first_process.kill()
        first_process.wait()
        assert ended(second, second.post("/admin/retrain", json=order).json()["id"]) == "succeeded"


def ended(http: httpx.Client, run: str) -> str:
    while (state := http.get(f"/admin/retrain/{run}").json()["state"]) not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.05)
    return str(state)
