"""The documents for operators name tests, settings and commands: each must be there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from onebase_server.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("security.md", "faults.md", "operations.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_document_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)(?:::(\w+))?`", page.read_text("utf-8"))
    assert named or page.name == "operations.md"
    for path, function in named:
        file = ROOT / (path if path.startswith("tests/") else f"tests/faults/{path}")
        assert file.is_file(), path
        assert not function or re.search(rf"^(?:async )?def {function}\(", file.read_text("utf-8"), re.MULTILINE), (
            function
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_variable_that_a_document_names_is_a_setting(page: Path) -> None:
    known = {f"ONEBASE_{each.name.upper()}" for each in fields(Settings)} | {"ONEBASE_HOME"}
    assert set(re.findall(r"ONEBASE_[A-Z_]+", page.read_text("utf-8"))) - known == set()


def test_bounds_in_the_security_document_are_the_defaults() -> None:
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    defaults = {each.name: each.default for each in fields(Settings)}
    for name, words in {
        "max_body_mb": "{} MB, checked", "max_file_mb": "uploads {} MB", "slow_client_s": "{:.0f} s for the head",
        "keep_alive_s": "| {} s (longer",
        "max_connections": "| {} |", "queue_limit": "{} sequences", "max_request_s": "{:.0f} s |",
    }.items():  # fmt: skip
        assert words.format(defaults[name]) in text, name
