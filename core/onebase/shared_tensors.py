"""Tensors that several processes hold once: on a CPU as one mapped file, on CUDA as IPC handles. Torch lives here.

A file's pages are the kernel's page cache: however many processes map it, memory holds it once, and it outlives them
all. CUDA memory goes with the process that allocated it, so its users must watch that process. Knows no model.
"""

import base64
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from onebase.durable import fsync_folder
from onebase.errors import InvalidInput
from onebase.safetensors_header import read_header

_DTYPES: Final = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_PAGE: Final = 4096
_ALIGNED: Final = 64
"""Bytes: a cache line, and the widest load of the kernels that read these tensors."""


def hold_on_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values out of the file, which is written anew unless it holds just these. Raises OSError."""
    if not _holds(path, tensors):
        write_aligned(path, tensors)
    return map_file(path)


def map_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, without a copy. Pages are shared until written to, and then private to the writer.

    Raises InvalidInput for a damaged file, OSError for one that is not there.
    """
    header = read_header(path)
    size = path.stat().st_size
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)
    begin = size - max((tensor.end for tensor in header.tensors.values()), default=0)
    mapped = {}
    for name, tensor in header.tensors.items():
        if tensor.dtype not in _DTYPES:
            raise InvalidInput(f"{path.name}: tensor {name} is {tensor.dtype}, which is not shared", param="base")
        flat = raw[begin + tensor.start : begin + tensor.end]
        mapped[name] = flat.view(_DTYPES[tensor.dtype]).view(tensor.shape)
    return mapped


def write_aligned(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file whose tensors begin at multiples of 64 bytes; whole or absent."""
    # Without holes, as the format asks: sizes that would put the next one off come last.
    order = sorted(tensors, key=lambda name: (_bytes(tensors[name]) % _ALIGNED != 0, name))
    entries: dict[str, Any] = {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + _bytes(tensor)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % _PAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def _holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    try:
        found = map_file(path)
    except (OSError, InvalidInput):
        return False
    return found.keys() == tensors.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        # Bytes, not values: a NaN would equal nothing.
        and torch.equal(found[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))
        for name, tensor in tensors.items()
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def cuda_handles(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Name -> what another process on this machine needs to open the tensor, as JSON.

    The handles are torch's own (torch/multiprocessing/reductions.py). They are good as long as this process lives and
    keeps the tensors; whoever can read them can write to the memory.
    """
    handles = {}
    for name, tensor in tensors.items():
        storage: Any = tensor.untyped_storage()
        device, handle, size, offset, counter, counter_offset, event, waits = storage._share_cuda_()
        handles[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "storage_offset": tensor.storage_offset(),
            "device": device,
            "handle": _text(handle),
            "size": size,
            "offset": offset,
            "counter": _text(counter),
            "counter_offset": counter_offset,
            "event": _text(event),
            "waits": waits,
        }
    return handles


def open_cuda_handles(handles: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors behind `cuda_handles` of another process. Raises RuntimeError when CUDA refuses one."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    opened = {}
    for name, entry in handles.items():
        storage = torch.UntypedStorage._new_shared_cuda(
            entry["device"],
            base64.b64decode(entry["handle"]),
            entry["size"],
            entry["offset"],
            base64.b64decode(entry["counter"]),
            entry["counter_offset"],
            base64.b64decode(entry["event"]),
            entry["waits"],
        )
        empty = torch.empty(0, dtype=_DTYPES[entry["dtype"]], device=storage.device)
        opened[name] = empty.set_(storage, entry["storage_offset"], tuple(entry["shape"]), tuple(entry["stride"]))
    return opened


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
