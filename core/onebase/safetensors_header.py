"""Read only the header of a safetensors file, trusting none of it. No tensor is loaded; knows nothing of LoRA.

Format: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape, data_offsets), then the
data without holes or overlaps. Source: the safetensors format description; limits are ours and stricter.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from onebase.errors import InvalidInput

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_KEPT_BYTES = 256 << 10
"""Headers up to this size are parsed once for all files that have the same: adapters of one recipe have."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header declares it. `start` and `end` are byte offsets behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """All tensors of a file by name, and its free-text metadata. Two files with one `digest` have the same header."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    """Where in the file the data begins, which `TensorInfo` counts from."""
    digest: bytes


def read_header(path: Path) -> SafetensorsHeader:
    """Raises InvalidInput saying what is wrong with the file; OSError if it can't be read at all."""
    with path.open("rb") as file:
        try:
            return _read(file)
        except _BrokenError as error:
            raise InvalidInput(f"{path.name} is not a sound safetensors file: {error}", param="adapter") from error


class _BrokenError(ValueError):
    """Why a header is refused."""


def _read(file: BinaryIO) -> SafetensorsHeader:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _BrokenError(f"it is {size} bytes long, too short for a header")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _BrokenError(f"its header claims {length} bytes, more than the limit of {MAX_HEADER_BYTES}")
    if length > size - 8:
        raise _BrokenError(f"its header claims {length} bytes, but only {size - 8} follow: the file is cut off")
    raw, data_bytes = file.read(length), size - 8 - length
    return _parse_kept(raw, data_bytes) if length <= MAX_KEPT_BYTES else _parse_header(raw, data_bytes)


def _parse_header(raw: bytes, data_bytes: int) -> SafetensorsHeader:
    entries = _parse(raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _BrokenError("__metadata__ must map texts to texts")
    if len(entries) > MAX_TENSORS:
        raise _BrokenError(f"it holds {len(entries)} tensors, more than the limit of {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_layout(tensors, data_bytes)
    return SafetensorsHeader(tensors, metadata, 8 + len(raw), hashlib.blake2b(raw, digest_size=16).digest())


_parse_kept = lru_cache(maxsize=32)(_parse_header)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except RecursionError as error:
        raise _BrokenError("its header is nested too deeply") from error
    except _BrokenError:
        raise
    except ValueError as error:
        raise _BrokenError(f"its header is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _BrokenError("its header is not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _BrokenError("its header names an entry twice")
    return value


def _no_constants(name: str) -> NoReturn:
    raise _BrokenError(f"its header holds {name}")


def _tensor(name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _BrokenError(f"entry {name[:80]!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _BrokenError(f"tensor {name[:80]!r} has unknown dtype {str(dtype)[:20]!r}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _BrokenError(f"tensor {name[:80]!r} has no valid shape")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise _BrokenError(f"tensor {name[:80]!r} has no valid data_offsets")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _BrokenError(f"tensor {name[:80]!r}: its offsets do not span its shape and dtype")
    return TensorInfo(dtype, tuple(shape), start, end)


def _is_sizes(value: object) -> bool:
    """A list of whole numbers of at most 63 bits."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """The tensors must tile the data exactly."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            kind = "overlaps another" if tensor.start < position else "leaves a hole before it"
            raise _BrokenError(f"tensor {name[:80]!r} {kind}")
        position = tensor.end
    if position > data_bytes:
        raise _BrokenError(f"its tensors need {position} bytes, but only {data_bytes} are there: the file is cut off")
    if position < data_bytes:
        raise _BrokenError(f"{data_bytes - position} bytes behind the last tensor belong to none")
