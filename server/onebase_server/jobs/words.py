"""What a user may read of the words of processes and libraries: they name no folder of this machine. Pure functions."""

import re
from pathlib import Path

# Two names or more after a slash that begins a word: no URL, no `and/or`, no `ft:` name.
_PLACE = re.compile(r"(?<![\w.:/~@-])/(?:[^\s/:'\"`,;()\[\]<>]+/)+([^\s/:'\"`,;()\[\]<>]*)")


def without_paths(text: str, folder: Path) -> str:
    """Of each path only its last name. `folder` is the run's own: what lies in it keeps its place there."""
    return _PLACE.sub(r"\1", text.replace(f"{folder}/", ""))
