"""Reading the adapter store: names to versions. Writes nothing, takes no lock, loads no torch.

Every answer comes from the pointers on the disk as they are now (store_pointer.py). What never changes, what a version
says about itself, is kept in memory for those asked for last: a server publishes for years.
"""

import builtins
import difflib
import logging
import os
import random
import re
from pathlib import Path

from onebase.errors import AdapterInvalid, InvalidInput, ModelNotFound
from onebase.lru import Lru
from onebase.store_pointer import POINTER, Pointer, PointerReader, sticky_draw
from onebase.store_version import Entry, Version

__all__ = ["Entry", "StoreReader", "Version", "is_alias"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"ft:[!-~]{1,250}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
MAX_REMEMBERED = 4096
"""Versions, names and aliases each. Some 6 MB when all are full; what does not fit is read again."""

logger = logging.getLogger(__name__)


def is_alias(model: str) -> bool:
    """Whether the model name has the form of an alias (`ft:...`)."""
    return _ALIAS.fullmatch(model) is not None


class StoreReader:
    """The reading half of `AdapterStore`."""

    def __init__(self, root: Path, remembered: int = MAX_REMEMBERED) -> None:
        self.root = root
        self._pointers = PointerReader(remembered)
        self._versions: Lru[tuple[str, int], Version] = Lru(remembered)
        self._alias_names: Lru[str, str] = Lru(remembered)
        self._warned: Lru[str, bool] = Lru(remembered)

    def resolve(self, model: str, *, draw: float | None = None, sticky: str | None = None) -> Version:
        """The version that `name`, `name@3` or an alias (`ft:...`) means now. Raises ModelNotFound with near names.

        If the name's traffic is split, `sticky` (say, a user's id) decides, else `draw` in [0, 1), else chance.
        """
        name, at, number = model.partition("@")
        if is_alias(model):
            found = self._by_alias(model)
        elif at:
            found = self._exact(name, number)
        else:
            found = self._served(name, draw, sticky)
        if found is None:
            raise ModelNotFound(model, self._near(model))
        return found

    def list(self) -> list[Entry]:
        """All adapters by name. Those whose last version was removed, and those that can't be read, are left out."""
        entries = []
        for name in self._names():
            try:
                entry = self.get(name)
            except (OSError, InvalidInput) as error:
                self._warn(name, error)
                continue
            if entry is not None:
                entries.append(entry)
        return entries

    def get(self, name: str) -> Entry | None:
        """One adapter with its versions; None if there is none of that name. A damaged version is left out: naming it
        says what is wrong, and the others must not suffer for it."""
        pointer = self._pointer(name, push_out=False)
        if pointer is None or not pointer.versions:
            return None
        versions = tuple(version for number in pointer.versions if (version := self._readable(name, number)))
        whole = {version.version for version in versions}
        aliases = {alias: number for alias, number in pointer.aliases.items() if number in whole}
        return Entry(name, versions, pointer.weights, aliases)

    def _readable(self, name: str, number: int) -> Version | None:
        try:
            return self._version(name, number, push_out=False)
        except AdapterInvalid as error:
            self._warn(f"{name}@{number}", error)
            return None

    def _warn(self, what: str, error: Exception) -> None:
        """Once each: lists are read all the time."""
        if self._warned.get(what) is None:
            self._warned.keep(what, True)
            logger.warning("%s is left out of the list: %s", what, error)

    def _exact(self, name: str, number: str) -> Version | None:
        pointer = self._pointer(name)
        if pointer is None or not _VERSION.fullmatch(number) or int(number) not in pointer.versions:
            return None
        return self._version(name, int(number))

    def _served(self, name: str, draw: float | None, sticky: str | None) -> Version | None:
        pointer = self._pointer(name)
        if pointer is None:
            return None
        if sticky is not None:
            draw = sticky_draw(sticky)
        chosen = pointer.choose(random.random() if draw is None else draw)
        return None if chosen is None else self._version(name, chosen)

    def _by_alias(self, alias: str) -> Version | None:
        """From the name that had it last time, else by looking through all names."""
        known = self._alias_names.get(alias)
        for name in [known] if known else []:
            pointer = self._pointer(name)
            if pointer is not None and alias in pointer.aliases:
                return self._version(name, pointer.aliases[alias])
        for name in self._names():
            pointer = self._pointer(name, push_out=False)
            if pointer is not None and alias in pointer.aliases:
                self._alias_names.keep(alias, name)
                return self._version(name, pointer.aliases[alias])
        return None

    def _version(self, name: str, number: int, *, push_out: bool = True) -> Version:
        """A version never changes, and its number is never given again."""
        known = self._versions.get((name, number))
        if known is None:
            known = Version.read(self._folder(name), name, number)
            self._versions.keep((name, number), known, push_out=push_out)
        return known

    def _pointer(self, name: str, *, push_out: bool = True) -> Pointer | None:
        """Without its history. `push_out`: see `Lru.keep`; who walks through all names says no."""
        if not _NAME.fullmatch(name):
            return None
        return self._pointers.read(self._folder(name) / POINTER, push_out=push_out)

    def _folder(self, name: str) -> Path:
        """The only way from a name to a path."""
        if not _NAME.fullmatch(name):
            raise InvalidInput(
                f"adapter name {name[:80]!r} must be 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit",
                param="name",
            )
        return self.root / name

    def _names(self) -> builtins.list[str]:
        try:
            return sorted(name for name in os.listdir(self.root) if _NAME.fullmatch(name))
        except FileNotFoundError:
            return []

    def _near(self, model: str) -> builtins.list[str]:
        """Names, aliases, and for `name@9` the versions that there are."""
        candidates: builtins.list[str] = []
        for name in self._names():
            pointer = self._pointer(name, push_out=False)
            if pointer is not None and pointer.versions:
                candidates += [name, *pointer.aliases]
                if model.startswith(f"{name}@"):
                    return [f"{name}@{number}" for number in pointer.versions[-3:]]
        return difflib.get_close_matches(model, candidates, n=3, cutoff=0.5)
