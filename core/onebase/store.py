"""The adapter store on disk: publish, import, export; moving and removing are store_moves.py's. No torch.

    <adapters>/<name>/versions/<n>/   adapter_config.json, adapter_model.safetensors, onebase.json; never changed
    <adapters>/<name>/current.json    the pointer: what exists, what is served (store_pointer.py)
    <adapters>/.staging/, .lock       scratch of running publishes; the lock between processes

The disk is the truth: any process may publish at any time, and every reader sees it at its next `resolve`.
docs/decisions/0003-adapter-identity.md has the reasons.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onebase.adapter import CONFIG, MANIFEST, WEIGHTS, AdapterFiles, validate_adapter
from onebase.durable import copy_file, fsync_folder, locked, write_file
from onebase.errors import AdapterInvalid, Conflict, InvalidInput
from onebase.manifest import BaseIdentity, Manifest, training_hash
from onebase.prompt_types import PromptFormat
from onebase.store_moves import StoreMover, require_alias
from onebase.store_pointer import POINTER, Pointer, read_pointer
from onebase.store_read import Entry, Version

__all__ = ["AdapterStore", "Entry", "Version"]

Shapes = Mapping[str, tuple[int, int]]


class AdapterStore(StoreMover):
    """One folder of adapters. Cheap to make; safe to use from many threads and processes at once."""

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
            require_alias(alias)
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
