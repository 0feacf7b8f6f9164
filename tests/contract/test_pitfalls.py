"""Every pitfall that docs/training.md promises to avoid has a test by its number."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTED = re.compile(r"^(?:async )?def test_pitfall_(\d+)_", re.MULTILINE)


def test_each_pitfall_of_the_documents_table_has_a_test_of_its_number() -> None:
    section = (ROOT / "docs/training.md").read_text("utf-8").partition("## What other trainers' users ran into")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", section.partition("\n## ")[0], re.MULTILINE)
    promised = {int(number) for row in rows for number in row.split(",")}
    tests = (path for folder in ("core", "training") for path in (ROOT / "tests" / folder).glob("test_*.py"))
    tested = {int(number) for path in tests for number in TESTED.findall(path.read_text("utf-8"))}

    assert promised == set(range(1, 24))
    assert tested == promised
