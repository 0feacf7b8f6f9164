"""Pushing, by the real client to a small hub of our own on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from onebase.errors import InvalidInput, OnebaseError
from onebase_training import hub

TOKEN = "hf_ours"


class Hub(ThreadingHTTPServer):
    """Keeps what is committed, by repository and path. `refuses`: the status of its answer to a new repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses: int | None = None


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self._answer(200 if self._is_known() else 401, {"name": "me", "type": "user"})
        elif (name := self.path.removeprefix("/api/models/").partition("/revision/")[0]) in self.server.files:
            self._answer(200, {"id": name, "sha": "0" * 40, "siblings": []})
        else:
            self._answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._is_known():
            self._answer(401, {"error": "Invalid user token."})
        elif self.server.refuses is not None:
            self._answer(self.server.refuses, {"error": "You don't have the rights to do that."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.server.files.setdefault(name, {})
            self.server.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            self._answer(200, {"url": f"{self._at}/{name}", "id": name, "name": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    value = operation["value"]
                    self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            self._answer(200, {"commitUrl": f"{self._at}/{name}/commit/1", "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self._answer(200, {})

    @property
    def _at(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_folder_is_pushed_with_all_its_files(ours: Hub, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    hub.require_login("me/captain")

    assert hub.push(tmp_path, "me/captain")

    kept = {name: data for name, data in ours.files["me/captain"].items() if name != ".gitattributes"}
    assert kept == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    assert ours.private == {"me/captain": True}


def test_a_gguf_file_is_pushed_under_its_own_name(ours: Hub, tmp_path: Path) -> None:
    (tmp_path / "captain.gguf").write_bytes(b"GGUF...")

    assert hub.push(tmp_path / "captain.gguf", "me/captain", private=False)

    assert ours.files["me/captain"]["captain.gguf"] == b"GGUF..."
    assert ours.private == {"me/captain": False}


@pytest.mark.parametrize(
    ("token", "word"),
    [("hf_other", "the hub does not know the token: `hf auth login`"), ("", "no token. `hf auth login`")],
)
def test_a_token_that_does_not_work_is_told_before_anything_is_written(
    ours: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, word: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))

    with pytest.raises(OnebaseError, match=word):
        hub.require_login("me/captain")


def test_an_owner_that_the_token_may_not_write_to_is_told(ours: Hub, tmp_path: Path) -> None:
    ours.refuses = 403
    (tmp_path / "a.gguf").touch()

    with pytest.raises(OnebaseError, match="the token may not write there") as told:
        hub.push(tmp_path / "a.gguf", "other/captain")

    assert "rights to do that" in told.value.message


@pytest.mark.parametrize("name", ["captain", "a/b/c", "me/cap tain", ""])
def test_an_id_that_is_none_is_refused_at_once(name: str) -> None:
    with pytest.raises(InvalidInput, match="--push"):
        hub.require_login(name)


def test_a_hub_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(OnebaseError, match="could not be pushed to me/captain"):
        hub.push(tmp_path, "me/captain")
