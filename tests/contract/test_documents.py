"""The documents say what is there: links lead somewhere, commands exist, the map has every file."""

import importlib.util
import re
from pathlib import Path

import pytest
from typer.main import get_command

from onebase_server.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_and_onebase_command_in_the_documents_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = re.findall(r"(?:^|`|\$ )make ([a-z-]+)", text, flags=re.MULTILINE)
    called = re.findall(r"(?:^|`|\$ |bin/)onebase ([a-z]+)", text, flags=re.MULTILINE)
    assert sorted(set(used) - targets) == []
    assert sorted(set(called) - commands) == []


def test_readmes_map_has_every_file() -> None:
    spec = importlib.util.spec_from_file_location("make_map", ROOT / "docs" / "make_map.py")
    assert spec is not None
    assert spec.loader is not None
    make_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_map)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert make_map.updated(text) == text, "run `make map`"


def test_what_is_kept_secret_stays_out_of_the_project() -> None:
    """No path of a developer's machine and no package index's host stands in a file."""
    banned = re.compile(r"/work/|/root/|pypi\.org|files\.pythonhosted|download\.pytorch|registry\.npmjs")
    found = []
    for path in [*PAGES, *ROOT.glob("*.y*ml"), ROOT / "Makefile", ROOT / "Dockerfile", *ROOT.glob("**/package*.json")]:
        if ".venv" in path.parts or "node_modules" in path.parts or not path.is_file():
            continue
        found += [f"{path.name}: {hit}" for hit in banned.findall(path.read_text(encoding="utf-8"))]
    assert found == []
