"""The store's names, moved and removed: what each serves, roll back, aliases, and the end of versions. No torch.

Each move is one pointer file replaced under the store's lock (store_pointer.py). Nothing is read or checked here of
what a version holds; its files go once nobody reads them any more (store_hold.py).
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from onebase.durable import Staging, clear_temporaries, locked, replace_file
from onebase.errors import Conflict, InvalidInput, ModelNotFound
from onebase.store_hold import unheld
from onebase.store_pointer import POINTER, Pointer, read_pointer
from onebase.store_read import MAX_REMEMBERED, Entry, StoreReader, is_alias


class StoreMover(StoreReader):
    """The half of `AdapterStore` that moves names. What is taken away stays readable for whoever holds it."""

    def __init__(self, root: Path, remembered: int = MAX_REMEMBERED) -> None:
        super().__init__(root, remembered)
        self._gate = root / ".lock"
        self._staging = Staging(root / ".staging", self._gate)

    def set_current(
        self, name: str, version: int | Mapping[int, float], *, expected: Mapping[int, float] | None = None
    ) -> Entry:
        """Serve one version, or split the traffic: `{3: 0.9, 4: 0.1}`. Raises Conflict if what is served is not what
        the caller `expected`: somebody else has moved the name meanwhile."""
        weights = version if isinstance(version, Mapping) else {version: 1.0}

        def change(pointer: Pointer) -> Pointer:
            if expected is not None and pointer.weights != expected:
                raise Conflict(f"{name} was moved meanwhile", param="version")
            return pointer.serving(weights)

        return self._move(name, change)

    def rollback(self, name: str, to: int | None = None) -> Entry:
        """Serve what was served before the last move, or version `to`. Raises Conflict if there is nothing before."""
        return self._move(name, lambda pointer: pointer.rolled_back(to))

    def set_alias(self, alias: str, model: str) -> None:
        """Let a further name (`ft:...`) mean one version. Raises Conflict if it already means another."""
        require_alias(alias)
        version = self.resolve(model)
        with locked(self._gate):
            taken = self._by_alias(alias)
            if taken is not None and taken.id != version.id:
                raise Conflict(f"alias {alias} already means {taken.id}", param="alias")
            pointer = self._require(version.name)
            if version.version not in pointer.versions:
                raise ModelNotFound(version.id)
            aliases = {**pointer.aliases, alias: version.version}
            self._write(version.name, pointer.model_copy(update={"aliases": aliases}))

    def aliases(self) -> dict[str, str]:
        """Every alias -> `name@version`."""
        return {alias: f"{e.name}@{number}" for e in self.list() for alias, number in e.aliases.items()}

    def remove(self, model: str, *, force: bool = False, new_current: int | None = None) -> None:
        """Remove a version (`name@3`), or an adapter with all its versions (`name`, or an alias' version).

        A version that is served is refused (Conflict) unless `new_current` names the one to serve instead, or `force`
        lets the name fall back to what it served before, else the newest left, else nothing. Of an alias' version,
        which is a model of its own, none takes the place that was never served. Numbers are not reused.

        Files that a server's requests still hold, in whatever process, are left to its `sweep`.
        """
        for name, number in self.withdraw(model, force=force, new_current=new_current):
            self.discard(name, number)

    def withdraw(self, model: str, *, force: bool = False, new_current: int | None = None) -> Sequence[tuple[str, int]]:
        """As `remove`, but all files stay as yet: each (name, number) waits for `discard`."""
        with locked(self._gate):
            if is_alias(model) or "@" in model:
                version = self.resolve(model)
                name, doomed = version.name, [version.version]
                pointer = self._require(name)
                if new_current is not None:
                    pointer = pointer.serving({new_current: 1.0})
                elif force and version.version in pointer.weights:
                    pointer = pointer.fallen_back_from(version.version, or_newest=not is_alias(model))
                pointer = pointer.without(version.version)
            else:
                name = model
                pointer = self._require(name)
                doomed = [*pointer.versions]
                pointer = Pointer(last=pointer.last)
            self._write(name, pointer)
        for number in doomed:
            self._versions.forget((name, number))
        return [(name, number) for number in doomed]

    def discard(self, name: str, number: int, *, wait: bool = False) -> None:
        """Remove the files of a withdrawn version once nobody holds them: `wait` for that, else leave them to `sweep`,
        which also takes those of a process that died before."""
        folder = self._folder(name) / "versions" / str(number)
        with unheld(folder, wait=wait) as is_free:
            if is_free:
                self._discard(folder)

    def sweep(self) -> None:
        """Remove what is left behind: the scratch of the dead, and version folders that no pointer names, nor anybody
        holds."""
        if not self.root.is_dir():
            return
        self._staging.sweep()
        with locked(self._gate):  # a publish moves its folder in and commits under this lock, so none is under way
            for name in self._names():
                pointer = self._pointer(name) or Pointer()
                clear_temporaries(self._folder(name) / POINTER)
                for folder in (self._folder(name) / "versions").glob("*"):
                    if folder.name not in map(str, pointer.versions):
                        self._sweep(folder)

    def _move(self, name: str, change: Callable[[Pointer], Pointer]) -> Entry:
        with locked(self._gate):
            self._write(name, change(self._require(name)))
        entry = self.get(name)
        assert entry is not None
        return entry

    def _require(self, name: str) -> Pointer:
        """The whole pointer, to be changed. Under the lock. Raises ModelNotFound."""
        known = self._pointer(name)  # of a name that can be none it is None
        pointer = known and read_pointer(self._folder(name) / POINTER)
        if pointer is None or not pointer.versions:
            raise ModelNotFound(name, self._near(name))
        return pointer

    def _write(self, name: str, pointer: Pointer) -> None:
        """Under the lock."""
        path = self._folder(name) / POINTER
        clear_temporaries(path)
        replace_file(path, pointer.to_bytes())

    def _sweep(self, folder: Path) -> None:
        with unheld(folder, wait=False) as is_free, suppress(FileNotFoundError):  # `discard` was faster
            if is_free:
                shutil.rmtree(folder)

    def _discard(self, folder: Path) -> None:
        """Move out of sight first: no reader sees half a version."""
        with self._staging.folder() as scratch:
            try:
                os.rename(folder, scratch / "removed")
            except FileNotFoundError:
                return


def require_alias(alias: str) -> None:
    if not is_alias(alias):
        raise InvalidInput(f"alias {alias[:80]!r} must be 'ft:' and 1 to 250 visible characters", param="alias")
