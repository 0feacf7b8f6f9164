"""litellm, langchain-openai and `llm`, each as its users install it, in an environment of its own, unchanged."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_world import obey_masks
from live_server import Live, live_server

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent / "scripts"
SAYS = {
    "pirate": "Ahoy there.",
    "person": '{"name": "Ann", "age": 7}',
    "caller": '### CALL:\n{"name": "look", "arguments": {"q": "tea"}}',
}


class Cast(Live):
    """Each adapter has words of its own."""

    def reply(self, digest: str | None) -> list[int]:
        named = {version.digest: entry.name for entry in self.store.list() for version in entry.versions}
        return list(SAYS[named[digest]].encode()) if digest is not None else list(b"Hello there.")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("others"), kind=Cast) as live:
        obey_masks(live.runner)
        for name in SAYS:
            live.publish(name)
        yield live


def environment(folder: Path, *packages: str) -> Path:
    """A virtual environment with just these packages; its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin/pip"), "install", "--quiet", *packages], check=True, capture_output=True)
    return folder / "bin"


def run(live: Live, *command: str, **env: str) -> list[str]:
    given = {**os.environ, "ONEBASE_URL": f"{live.url}/v1", "PYTHONPATH": "", **env}
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_langchain(live: Live, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "langchain-openai") / "python"
    assert run(live, str(python), str(SCRIPTS / "langchain_chat.py")) == [
        "invoke: Ahoy there.",
        "stream: Ahoy there.",
        "usage: True",
        "structured: name='Ann' age=7",
        "tools: [('look', {'q': 'tea'})]",
        "error: model_not_found",
    ]


def test_litellm(live: Live, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "litellm") / "python"
    lines = run(live, str(python), str(SCRIPTS / "litellm_chat.py"))
    told = [line for line in lines if line.startswith(("reply:", "stream:", "error:"))]
    assert told == ["reply: Ahoy there.", "stream: Ahoy there.", "error: context", "error: not found"]


def test_llm(live: Live, tmp_path: Path) -> None:
    command = environment(tmp_path / "env", "llm") / "llm"
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/extra-openai-models.yaml").write_text(
        f"- model_id: ahoy\n  model_name: pirate\n  api_base: {live.url}/v1\n  api_key_name: none\n"
    )
    home = {"LLM_USER_PATH": str(tmp_path / "llm"), "OPENAI_API_KEY": "none"}
    assert run(live, str(command), "-m", "ahoy", "--key", "none", "Hi", **home) == ["Ahoy there."]
    assert run(live, str(command), "-m", "ahoy", "--key", "none", "--no-stream", "Hi", **home) == ["Ahoy there."]
