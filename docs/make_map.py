"""Writes README's map of the tree, one line a file, from the first sentence of each file's docstring.

Run `make map` after adding a file; tests/contract/test_documents.py fails when the map has drifted.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- map: begin (made by docs/make_map.py) -->", "<!-- map: end -->"
FOLDERS = (
    "core/onebase",
    "server/onebase_server",
    "training/onebase_training",
    "training/recipes",
    "training/data",
    "clients",
    "bench",
    "docs",
)


def tracked(folder: str) -> list[str]:
    out = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    skip = re.compile(r"(py\.typed|package-lock\.json|\.jsonl|/results/.*|/migrations/versions/.*)$")
    return [path for path in sorted(out.stdout.split()) if not skip.search(path) or path.startswith("training/data")]


def first_sentence(path: Path) -> str:
    """What a file is, in its own words: docstring, leading comment or first heading."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".md":
        text = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
    else:
        lines = (re.match(r"\s*(?:#|//|--|/?\*+)\s*(?!!)(\S.*)", line) for line in text.splitlines()[:5])
        text = next((line[1] for line in lines if line), "")
    sentence = re.split(r"(?<=[a-z`)]\.)\s|\n\n", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    return sentence.rstrip(".:")


def render() -> str:
    lines: list[str] = []
    for folder in FOLDERS:
        names = tracked(folder)
        if not names:
            continue
        lines.append(f"{folder}/")
        for name in names:
            about = first_sentence(ROOT / name)
            lines.append(f"  {name.removeprefix(folder + '/'):<34} {about}".rstrip())
    return "\n".join([BEGIN, "```text", *lines, "```", END])


def updated(text: str) -> str:
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + render() + after


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" in sys.argv:
        sys.exit("README's map has drifted: run `make map`" if new != text else 0)
    README.write_text(new, encoding="utf-8")
