"""One adapter's `current.json`: which versions exist, which are served, and what was served before.

Replacing this small file is the store's only commit. A version folder that it does not name does not exist, whatever
lies on the disk. Pure data plus one cached reader; locking is the store's.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onebase.errors import Conflict, InvalidInput, OnebaseError
from onebase.lru import Lru

POINTER = "current.json"
MAX_HISTORY = 100
_SETTLED_S = 2.0


class Pointer(BaseModel):
    """The file's content. `weights`: version -> share of the traffic, adding up to 1; {} serves nothing.

    `last` is the highest number ever given: it outlives removal, so a number never means two things. `history` holds
    earlier `weights`, newest last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    last: int = Field(default=0, ge=0)
    versions: tuple[int, ...] = ()
    weights: dict[int, float] = Field(default_factory=dict)
    history: tuple[dict[int, float], ...] = ()
    aliases: dict[str, int] = Field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"

    def with_version(self, version: int, aliases: Mapping[str, int], *, make_current: bool) -> "Pointer":
        """After publishing `version`."""
        added = self.model_copy(
            update={
                "last": version,
                "versions": (*self.versions, version),
                "aliases": {**self.aliases, **aliases},
            }
        )
        return added.serving({version: 1.0}) if make_current else added

    def serving(self, weights: Mapping[int, float]) -> "Pointer":
        """After moving the name to `weights`. Raises InvalidInput for a version that is not there or a bad share."""
        missing = sorted(set(weights) - set(self.versions))
        if missing:
            raise InvalidInput(
                f"version {missing[0]} does not exist; there are {_listed(self.versions)}", param="version"
            )
        total = sum(weights.values())
        if not weights or not all(0 < share < float("inf") for share in weights.values()):
            raise InvalidInput("each version's share of the traffic must be above 0", param="weights")
        shares = {version: share / total for version, share in sorted(weights.items())}
        if shares == self.weights:
            return self
        past = (*self.history, self.weights) if self.weights else self.history
        return self.model_copy(update={"weights": shares, "history": past[-MAX_HISTORY:]})

    def rolled_back(self, to: int | None) -> "Pointer":
        """After going back to what was served before, or to version `to`. Raises Conflict if there is nothing."""
        past = [entry for entry in self.history if set(entry) <= set(self.versions)]
        if to is None:
            if not past:
                raise Conflict("there is no earlier version to roll back to", param="version")
            return self.model_copy(update={"weights": past[-1], "history": tuple(past[:-1])})
        target = {to: 1.0}
        if target not in past:
            return self.serving(target)
        position = len(past) - 1 - past[::-1].index(target)
        return self.model_copy(update={"weights": target, "history": tuple(past[:position])})

    def fallen_back_from(self, doomed: int, *, or_newest: bool) -> "Pointer":
        """After taking `doomed` away by force: the rest of a split, else what was served before, else the newest or
        nothing."""
        left = {version: share for version, share in self.weights.items() if version != doomed}
        if left:
            return self.serving(left)
        for entry in reversed(self.history):
            if doomed not in entry and set(entry) <= set(self.versions):
                return self.serving(entry)
        others = [version for version in self.versions if or_newest and version != doomed]
        return self.serving({others[-1]: 1.0}) if others else self.model_copy(update={"weights": {}})

    def without(self, version: int) -> "Pointer":
        """After removing a version that is not served. Raises Conflict if it is."""
        if version in self.weights:
            raise Conflict(f"version {version} is served; name a new current version first, or force", param="version")
        kept = tuple(v for v in self.versions if v != version)
        past = tuple(entry for entry in self.history if version not in entry)
        aliases = {alias: v for alias, v in self.aliases.items() if v != version}
        return self.model_copy(update={"versions": kept, "history": past, "aliases": aliases})

    def choose(self, draw: float) -> int | None:
        """The version for a number in [0, 1): each has its share of the line, in order. None if nothing is served."""
        position = 0.0
        chosen = None
        for chosen, share in sorted(self.weights.items()):
            position += share
            if draw < position:
                return chosen
        return chosen  # the shares' sum may fall short of 1 by rounding


def sticky_draw(key: str) -> float:
    """The same number in [0, 1) for the same key, in every process: a user stays on one side of a canary."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


class PointerReader:
    """Reads pointers, from memory while the file has not changed. Sees another process's commit at once.

    What it gives lacks `history`, most of a pointer's size, which only those need who write: they take `read_pointer`.
    """

    def __init__(self, limit: int) -> None:
        self._known: Lru[Path, tuple[tuple[int, int, int], Pointer]] = Lru(limit)

    def read(self, path: Path, *, push_out: bool = True) -> Pointer | None:
        """None if there is no such file. Raises OnebaseError if it is damaged."""
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            self._known.forget(path)
            return None
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        known = self._known.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        whole = read_pointer(path)
        if whole is None:
            return None
        pointer = whole.model_copy(update={"history": ()})
        # A file this young could be replaced again within one tick of the file system's clock, on the same inode.
        if abs(time.time() - found.st_mtime) > _SETTLED_S:
            self._known.keep(path, (stamp, pointer), push_out=push_out)
        return pointer


def read_pointer(path: Path) -> Pointer | None:
    """The whole of it as it is now; None if there is no such file. Raises OnebaseError if it is damaged."""
    try:
        return Pointer.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise OnebaseError(
            f"{path} is damaged ({error.errors()[0]['msg']}); restore it from a backup, or move the folder away and "
            "import its versions again"
        ) from error


def _listed(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"
