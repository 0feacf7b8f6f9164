"""A fetched base's quantised copy, `<base>/nf4/`: written at the first load, read at every later one.

Quantising is most of a load's time (5 s against 0.2 s for 135M parameters; minutes against seconds for 7B), and
every process of a run pays it. The values are the same bits. Only folders that onebase fetched get a copy; it can be
thrown away at any time.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Final

from onebase.bases import RECORD, BaseSpec, file_sha256, read_record

_NOTE: Final = "onebase_nf4.json"


def quantized_copy(spec: BaseSpec) -> Path | None:
    """The folder of a whole copy of this very base, else None."""
    folder = spec.path / "nf4"
    try:
        note: dict[str, Any] = json.loads((folder / _NOTE).read_text("utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in note["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole and note.get("of") == _origin(spec) else None


def write_quantized_copy(spec: BaseSpec, model: Any) -> bool:
    """Keep the loaded model's NF4 weights beside the base. False where there is no place or no right to write."""
    if read_record(spec.path) is None or not os.access(spec.path, os.W_OK):
        return False
    scratch = spec.path / f".nf4-{uuid.uuid4().hex}"
    try:
        model.save_pretrained(scratch, max_shard_size="4GB")
        files = [file for file in scratch.iterdir() if file.is_file()]
        note = {"of": _origin(spec), "sizes": {file.name: file.stat().st_size for file in files}}
        (scratch / _NOTE).write_text(json.dumps(note) + "\n", "utf-8")
        for file in scratch.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        old = spec.path / "nf4"
        if quantized_copy(spec) is None:
            shutil.rmtree(old, ignore_errors=True)
            scratch.rename(old)
    except OSError:  # a full disk, or another process was faster: a copy is only a convenience
        return quantized_copy(spec) is not None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _origin(spec: BaseSpec) -> str:
    """Changes whenever the base's own files do."""
    return f"{spec.identity.revision} {spec.identity.quantization} {file_sha256(spec.path / RECORD)}"
