"""The home folder's version, and the way up from older ones. A newer folder than this program knows is refused.

A step must be safe to do again: a crash between a step and the new number repeats it.
"""

import os
from collections.abc import Callable
from pathlib import Path

from onebase.durable import locked, replace_file
from onebase.errors import InvalidInput

CURRENT = 1
FILE = "version"


def version_of(root: Path) -> int:
    """0: from before there were numbers. Raises InvalidInput for what is no number."""
    try:
        text = (root / FILE).read_text("ascii").strip()
        return int(text)
    except FileNotFoundError:
        return 0
    except (ValueError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{root / FILE} holds no version number: is {root} a home folder of onebase?", param="home"
        ) from error


def upgrade(root: Path) -> int:
    """Bring the folder up to this program's version; which one it had. Safe from several processes at once."""
    found = version_of(root)
    check(root, found)
    if found == CURRENT:
        return found
    with locked(root / "locks" / "version.lock"):
        found = version_of(root)
        check(root, found)
        for step in STEPS[found:]:
            step(root)
        replace_file(root / FILE, f"{CURRENT}\n".encode())
    return found


def check(root: Path, found: int) -> None:
    if found > CURRENT:
        raise InvalidInput(
            f"the home folder {root} is of version {found} and this onebase knows none above {CURRENT}: "
            "install the newer onebase again, or restore the backup from before the upgrade",
            param="home",
        )


def close_to_others(root: Path) -> None:
    """0 -> 1: the folder holds keys' hashes and users' data, and early versions left it as the umask had it."""
    os.chmod(root, 0o700)
    for name in ("onebase.db", "onebase.db-wal", "onebase.db-shm"):
        if (root / name).exists():
            os.chmod(root / name, 0o600)


STEPS: tuple[Callable[[Path], None], ...] = (close_to_others,)
"""STEPS[n] leads from version n to n + 1."""
assert len(STEPS) == CURRENT
