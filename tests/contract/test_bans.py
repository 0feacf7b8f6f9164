"""The bans of ARCHITECTURE.md that import-linter can't see, checked on the source text and in a fresh interpreter."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT / "core/onebase", ROOT / "server/onebase_server", ROOT / "training/onebase_training"]
SOURCES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]


def lines_with(pattern: str, *, except_in: set[str]) -> list[str]:
    """`path:line: text` of each hit outside the files, or the folders, of those names."""
    found = []
    for path in SOURCES:
        if except_in & set(path.parts[-2:]):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def test_prompt_headers_stand_in_prompt_only() -> None:
    assert lines_with(r"### (HUMAN|RESPONSE|SYSTEM|TOOL)", except_in={"prompt.py", "prompt_formats.py"}) == []


def test_the_environment_is_read_in_settings_and_the_command_line_only() -> None:
    assert (
        lines_with(r"os\.environ|os\.getenv", except_in={"settings.py", "cli", "__main__.py", "command_parts.py"}) == []
    )


def test_packages_do_not_print() -> None:
    assert lines_with(r"^\s*print\(", except_in=set()) == []


def test_no_pickle_is_loaded() -> None:
    assert lines_with(r"pickle\.load|torch\.load\((?!.*weights_only=True)", except_in=set()) == []


@pytest.mark.parametrize(
    "module",
    ["onebase.prompt", "onebase.store", "onebase.adapter", "onebase_server.app", "onebase_server.cli.main"],
)
def test_importing_loads_no_torch(module: str) -> None:
    heavy = ("torch", "transformers", "peft", "bitsandbytes")
    code = f"import {module}, sys; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
