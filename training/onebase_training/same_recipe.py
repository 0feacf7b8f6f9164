"""What a checkpoint was made with, written into it: it goes on only under the same settings and rows. No torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from onebase.errors import TrainingError
from onebase_training.config import Recipe
from onebase_training.rows import Row

MADE_WITH: Final = "made_with.json"
_MAY_CHANGE: Final = ("compute", "description", "eval")
"""Sections that change no weight: a run may go on with less memory, or on another device."""


def made_with(recipe: Recipe, rows: Sequence[Row]) -> dict[str, Any]:
    """What the weights of a step depend on: the settings, and every row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.key)
    settings = {key: value for key, value in recipe.settings().items() if key not in _MAY_CHANGE}
    return {"settings": settings, "rows": digest.hexdigest()}


def write_made_with(checkpoint: Path, values: Mapping[str, Any]) -> None:
    (checkpoint / MADE_WITH).write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def require_same_recipe(checkpoint: Path, values: Mapping[str, Any]) -> None:
    """Raises TrainingError that names every setting which differs."""
    try:
        then = json.loads((checkpoint / MADE_WITH).read_text("utf-8"))
    except FileNotFoundError:
        raise TrainingError(f"{checkpoint} was made by another build of onebase: start without --resume") from None
    now = json.loads(json.dumps(values))  # as it would be read: no tuples
    changed = [f"{name} was {was!r} and is {has!r}" for name, was, has in _changes(then["settings"], now["settings"])]
    if not changed and then["rows"] != now["rows"]:
        changed = ["the training rows are others (the files, or how the prompt is rendered)"]
    if changed:
        raise TrainingError(
            f"{checkpoint} was made by another recipe: {'; '.join(changed)}. Put it back as it was, or start "
            "without --resume",
            code="recipe_changed",
        )


def _changes(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _changes(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif then != now:
        yield path, then, now
