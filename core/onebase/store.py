"""The adapter store on disk: publish, import, resolve, roll back, split traffic, remove, export. No torch.

    <adapters>/<name>/versions/<n>/   adapter_config.json, adapter_model.safetensors, onebase.json; never changed
    <adapters>/<name>/current.json    the pointer: what exists, what is served (store_pointer.py)
    <adapters>/.staging/, .lock       scratch of running publishes; the lock between processes

The disk is the truth: any process may publish at any time, and every reader sees it at its next `resolve`.
docs/decisions/0003-adapter-identity.md has the reasons.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onebase.adapter import CONFIG, MANIFEST, WEIGHTS, AdapterFiles, validate_adapter
from onebase.durable import Staging, clear_temporaries, copy_file, fsync_folder, locked, replace_file, write_file
from onebase.errors import AdapterInvalid, Conflict, InvalidInput, ModelNotFound
from onebase.manifest import BaseIdentity, Manifest, training_hash
from onebase.prompt_types import PromptFormat
from onebase.store_pointer import POINTER, Pointer, read_pointer
from onebase.store_read import MAX_REMEMBERED, Entry, StoreReader, Version, is_alias

__all__ = ["AdapterStore", "Entry", "Version"]

Shapes = Mapping[str, tuple[int, int]]


class AdapterStore(StoreReader):
    """One folder of adapters. Cheap to make; safe to use from many threads and processes at once."""

    def __init__(self, root: Path, remembered: int = MAX_REMEMBERED) -> None:
        super().__init__(root, remembered)
        self._gate = root / ".lock"
        self._staging = Staging(root / ".staging", self._gate)
        self._withdrawn: set[tuple[str, int]] = set()

    def publish(
        self,
        source_dir: Path,
        name: str,
        *,
        base: BaseIdentity,
        prompt_format: PromptFormat = "human_response",
        training: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float | int | str | None] | None = None,
        aliases: Sequence[str] = (),
        base_shapes: Shapes | None = None,
        make_current: bool = True,
        same_base: bool = False,
    ) -> Version:
        """Copy PEFT's two files from `source_dir` in as the name's next version, after full validation.

        All or nothing: at any moment of a crash the store is as before or as after. Raises AdapterInvalid with every
        problem of the files, InvalidInput for a bad name or alias, Conflict for an alias that is taken.
        """
        self._folder(name)
        for alias in aliases:
            _require_alias(alias)
        self.root.mkdir(parents=True, exist_ok=True)
        with self._staging.folder() as scratch:
            staged = scratch / "version"
            staged.mkdir()
            weights_sha256, config_sha256 = _copy_adapter(source_dir, staged)
            _validate(staged, source_dir, base_shapes, base, same_base)
            fields: dict[str, Any] = {
                "name": name,
                "base": base,
                "prompt_format": prompt_format,
                "training": dict(training or {}),
                "training_hash": training_hash(dict(training or {})) if training else "",
                "metrics": dict(metrics or {}),
                "created_at": int(time.time()),
                "weights_sha256": weights_sha256,
                "config_sha256": config_sha256,
                "aliases": list(aliases),
            }
            with locked(self._gate):
                return self._commit(staged, fields, make_current)

    def _commit(self, staged: Path, fields: Mapping[str, Any], make_current: bool) -> Version:
        """Under the lock: give a number, move the folder in, and replace the pointer, which is the commit."""
        name = str(fields["name"])
        pointer = read_pointer(self._folder(name) / POINTER) or Pointer()
        number = pointer.last + 1
        aliases = list(fields["aliases"])
        for alias in aliases:
            if self._by_alias(alias) is not None:
                raise Conflict(f"alias {alias} is already taken", param="aliases")
        manifest = Manifest(version=number, **fields)
        write_file(staged / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
        fsync_folder(staged)
        versions = self._folder(name) / "versions"
        versions.mkdir(parents=True, exist_ok=True)
        target = versions / str(number)
        if target.exists():  # moved in by a process that died before its commit; nobody can know it
            shutil.rmtree(target)
        os.rename(staged, target)
        for folder in (versions, versions.parent, self.root):
            fsync_folder(folder)
        moved = pointer.with_version(number, dict.fromkeys(aliases, number), make_current=make_current)
        self._write(name, moved)
        return self._version(name, number)

    def import_folder(
        self,
        path: Path,
        name: str,
        *,
        base: BaseIdentity | None = None,
        prompt_format: PromptFormat | None = None,
        base_shapes: Shapes | None = None,
        make_current: bool = True,
        same_base: bool = False,
    ) -> Version:
        """Publish a PEFT LoRA folder from elsewhere, or one that `export` wrote (its manifest is taken over).

        `base`: the base that it must fit; without it the adapter's own word is recorded unchecked. Refused with the
        reason: pickles, links, another base (unless `same_base`), whatever can't be served exactly.
        """
        links = [entry.name for entry in path.iterdir() if entry.is_symlink()] if path.is_dir() else []
        if links:
            hint = "copy the folder with links followed first (cp -rL)"
            raise AdapterInvalid(str(path), [f"{link} is a symbolic link; {hint}" for link in sorted(links)])
        files = AdapterFiles.read(path)
        validate_adapter(files, base_shapes, base, same_base=same_base)
        own = files.manifest
        named = BaseIdentity(id=files.config.base_model_name_or_path or "unknown", quantization="unknown")
        return self.publish(
            path,
            name,
            base=base or (own.base if own else named),
            prompt_format=prompt_format or (own.prompt_format if own else "human_response"),
            training=own.training if own else None,
            metrics=own.metrics if own else None,
            base_shapes=base_shapes,
            make_current=make_current,
            same_base=True,
        )

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
        _require_alias(alias)
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
        """
        for name, number in self.withdraw(model, force=force, new_current=new_current):
            self.discard(name, number)

    def withdraw(self, model: str, *, force: bool = False, new_current: int | None = None) -> Sequence[tuple[str, int]]:
        """As `remove`, but the files stay for those who still read them: each (name, number) waits for `discard`."""
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
            self._withdrawn.update((name, number) for number in doomed)
            self._write(name, pointer)
        for number in doomed:
            self._versions.forget((name, number))
        return [(name, number) for number in doomed]

    def discard(self, name: str, number: int) -> None:
        """Remove the files of a withdrawn version. A process that dies before leaves them to `sweep`."""
        try:
            self._discard(self._folder(name) / "versions" / str(number))
        finally:
            self._withdrawn.discard((name, number))

    def export(self, model: str, dest: Path) -> Path:
        """Write a version's three files into a new folder that PEFT, vLLM and `import_folder` read."""
        version = self.resolve(model)
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise Conflict(f"{dest} already exists and is not an empty folder", param="dest")
        scratch = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            for file in (CONFIG, WEIGHTS, MANIFEST):
                copy_file(version.path / file, scratch / file)
            fsync_folder(scratch)
            os.replace(scratch, dest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        fsync_folder(dest.parent)
        return dest

    def sweep(self) -> None:
        """Remove what crashed processes left behind: scratch, and version folders that no pointer names."""
        if not self.root.is_dir():
            return
        self._staging.sweep()
        with locked(self._gate):  # a publish moves its folder in and commits under this lock, so none is under way
            for name in self._names():
                pointer = self._pointer(name) or Pointer()
                clear_temporaries(self._folder(name) / POINTER)
                kept = {*pointer.versions, *(number for of, number in self._withdrawn if of == name)}
                for folder in (self._folder(name) / "versions").glob("*"):
                    if folder.name not in map(str, kept):
                        shutil.rmtree(folder)

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

    def _discard(self, folder: Path) -> None:
        """Move out of sight first: no reader sees half a version."""
        with self._staging.folder() as scratch:
            try:
                os.rename(folder, scratch / "removed")
            except FileNotFoundError:
                return


def _copy_adapter(source: Path, staged: Path) -> tuple[str, str]:
    """Only the two files that PEFT reads are taken. Their sha256: (weights, config)."""
    try:
        return copy_file(source / WEIGHTS, staged / WEIGHTS), copy_file(source / CONFIG, staged / CONFIG)
    except FileNotFoundError:
        AdapterFiles.read(source)  # names what is missing
        raise
    except InvalidInput as error:
        raise AdapterInvalid(str(source), [error.message]) from error


def _validate(staged: Path, source: Path, base_shapes: Shapes | None, base: BaseIdentity, same_base: bool) -> None:
    """On the copy, which nobody else can change any more; errors name the folder that the caller gave."""
    try:
        validate_adapter(AdapterFiles.read(staged), base_shapes, base, same_base=same_base)
    except AdapterInvalid as error:
        raise AdapterInvalid(str(source), error.problems) from error


def _require_alias(alias: str) -> None:
    if not is_alias(alias):
        raise InvalidInput(f"alias {alias[:80]!r} must be 'ft:' and 1 to 250 visible characters", param="alias")
