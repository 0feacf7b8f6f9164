"""A version's files -> one adapter in host memory, checked as far as that goes without a look at its values.

For a GPU that is the file's data as it is (`PackedAdapter`), which the device lays out, and whose values it checks;
for a CPU it is the pools' layout (`TorchHostAdapter`), values checked. Nothing here touches the device or the slots.
"""

import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onebase.adapter import WEIGHTS, AdapterFiles, BaseIdentity, check_base, validate_adapter
from onebase.errors import AdapterInvalid
from onebase.lru import Lru
from onebase_server.engine.adapter_plan import AdapterPlan, Chunk, Layout, Piece, make_plan, tensor_name
from onebase_server.engine.host_memory import HostBlock, HostMemory
from onebase_server.engine.weights import PROJECTIONS, ModelWeights

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INFINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Bits of an infinity by compute dtype."""
_READ_BYTES = 4 << 20
"""Files are read in parts of this size, by several threads: one alone copies from the page cache at 5-10 GB/s."""
_PLANS_KEPT = 64


@dataclass(frozen=True, slots=True)
class TorchHostAdapter:
    """Implements `HostAdapter`: in the pools' layout and dtype."""

    rank: int
    a: dict[str, Tensor]  # projection -> [layers, I, rank, K]; an expanded zero where no module is targeted
    b: dict[str, Tensor]  # projection -> [layers, rank, N], scaling folded in
    module_ranks: Mapping[str, tuple[int, ...]]  # projection -> one rank a module, 0 where not targeted

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self.a.values(), *self.b.values()))


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """Implements `HostAdapter`: the file's data, and the plan that unpacks it."""

    path: Path
    plan: AdapterPlan
    block: HostBlock

    @property
    def rank(self) -> int:
        return self.plan.rank

    @property
    def module_ranks(self) -> Mapping[str, tuple[int, ...]]:
        return self.plan.module_ranks

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes


class AdapterReader:
    """Reads and checks folders. Keeps the plans of those it has seen: adapters of one recipe share theirs.
    Thread-safe."""

    def __init__(
        self,
        layout: Layout,
        identity: BaseIdentity | None,
        max_rank: int,
        *,
        chunk_bytes: int | None = None,
        longest_run: int | None = None,
    ) -> None:
        self.layout = layout
        self._shapes = layout.shapes()
        self._identity = identity
        self._max_rank = max_rank
        self._chunk_bytes = chunk_bytes
        self._longest_run = longest_run
        self._plans: Lru[tuple[bytes, str], AdapterPlan] = Lru(_PLANS_KEPT)
        self._threads = ThreadPoolExecutor(4, "onebase-read")

    def check(self, path: Path) -> tuple[AdapterFiles, AdapterPlan]:
        """Everything but the values. Raises AdapterInvalid with every problem found."""
        files = AdapterFiles.read(path)
        key = files.shape_key
        plan = self._plans.get(key)
        if plan is not None:
            check_base(files, self._identity)
            return files, plan
        validate_adapter(files, self._shapes, self._identity)
        plan = make_plan(
            files.tensors,
            files.config.scaling,
            self.layout,
            chunk_bytes=self._chunk_bytes,
            longest_run=self._longest_run,
        )
        if plan.rank > self._max_rank:
            problem = f"rank {plan.rank} is above the server's limit of {self._max_rank} (max_lora_rank)"
            raise AdapterInvalid(str(path), [problem])
        self._plans.keep(key, plan)
        return files, plan

    def read_packed(self, path: Path, memory: HostMemory) -> PackedAdapter:
        """The file's data as it is. Whether its values are finite, the device finds out."""
        files, plan = self.check(path)
        block = memory.block(plan.nbytes)
        self._fill(block.tensor, files, plan)
        memory.let_go(block)
        return PackedAdapter(path, plan, block)

    def read_laid_out(self, path: Path, dtype: torch.dtype) -> TorchHostAdapter:
        """In the pools' layout; raises AdapterInvalid for values that are not finite too."""
        files, plan = self.check(path)
        with (path / WEIGHTS).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = torch.frombuffer(mapped, dtype=torch.uint8)[files.header.data_start :]
        if len(plan.segments) > 1 or files.header.data_start % 4:
            data = _gather(data, plan)
        host = lay_out(data, plan, self.layout, dtype)
        if not _is_finite(host):
            raise not_finite(path, _infinite_tensors(host, self.layout), dtype)
        return host

    def _fill(self, target: Tensor, files: AdapterFiles, plan: AdapterPlan) -> None:
        view = target.numpy().data
        parts = [
            (files.header.data_start + one.in_file + at, one.in_memory + at, min(_READ_BYTES, one.nbytes - at))
            for one in plan.segments
            for at in range(0, one.nbytes, _READ_BYTES)
        ]
        with (files.path / WEIGHTS).open("rb") as file:
            fd = file.fileno()
            reads = [self._threads.submit(_read_at, fd, offset, view[at : at + size]) for offset, at, size in parts[1:]]
            try:
                offset, at, size = parts[0]
                _read_at(fd, offset, view[at : at + size])
            finally:
                errors = [read.exception() for read in reads]  # all must have ended before the file is closed
        for error in errors:
            if error is not None:
                raise error


def layout_of(weights: ModelWeights) -> Layout:
    """The sizes of a loaded base."""
    first = weights.layers[0].projections
    return Layout(
        layers=weights.geometry.layers,
        modules=PROJECTIONS,
        columns={name: projection.weight.shape[1] for name, projection in first.items()},
        offsets={name: projection.offsets for name, projection in first.items()},
    )


def lay_out(data: Tensor, plan: AdapterPlan, layout: Layout, dtype: torch.dtype) -> TorchHostAdapter:
    """A file's data in memory (uint8) -> the pools' layout, in memory of its own."""
    a, b = {}, {}
    for name, modules in layout.modules.items():
        shapes = (
            (layout.layers, len(modules), plan.rank, layout.columns[name]),
            (layout.layers, plan.rank, layout.offsets[name][-1]),
        )
        if not any(plan.module_ranks[name]):  # slots clear these rows themselves: no memory for zeros
            a[name], b[name] = (torch.zeros((), dtype=dtype).expand(shape) for shape in shapes)
            continue
        make = torch.empty if name in plan.complete else torch.zeros
        a[name], b[name] = (make(shape, dtype=dtype) for shape in shapes)
    for chunk in plan.chunks:
        unpack(data[chunk.start : chunk.end], chunk, a, b)
    return TorchHostAdapter(rank=plan.rank, a=a, b=b, module_ranks=plan.module_ranks)


def unpack(data: Tensor, chunk: Chunk, a: Mapping[str, Tensor], b: Mapping[str, Tensor], start: int = 0) -> None:
    """Write a chunk's bytes (uint8, on any device) to rank rows from `start` on of a [layers, I, rows, K] and b
    [layers, rows, N], rounded once to their dtype. Only what the plan covers is written."""
    typed = {
        name: data[: len(data) // _DTYPES[name].itemsize * _DTYPES[name].itemsize].view(_DTYPES[name])
        for name in {piece.dtype for piece in chunk.pieces}
    }
    for piece in chunk.pieces:
        source = _tensors_of(piece, typed[piece.dtype])
        layers, rows = slice(piece.layer, piece.layer + piece.count), slice(start, start + piece.rank)
        if piece.is_a:
            a[piece.projection][layers, piece.module, rows].copy_(source)
        else:  # the product is fp32, rounded once on its way out
            target = b[piece.projection][layers, rows, piece.low : piece.high]
            torch.mul(source.float().transpose(1, 2), piece.scaling, out=target)


def not_finite(path: Path, names: Iterable[str], dtype: torch.dtype) -> AdapterInvalid:
    """For the tensors whose values in `dtype` are not all finite."""
    narrow = "" if dtype == torch.float32 else f", or too large for {str(dtype).removeprefix('torch.')}"
    return AdapterInvalid(str(path), [f"{name} holds values that are not finite{narrow}" for name in names])


def _tensors_of(piece: Piece, typed: Tensor) -> Tensor:
    """[count, rank, K] or [count, N, rank]."""
    width = piece.high - piece.low
    rows, columns = (piece.rank, width) if piece.is_a else (width, piece.rank)
    size = typed.element_size()
    strides = (piece.stride // size, columns, 1)
    return typed.as_strided((piece.count, rows, columns), strides, typed.storage_offset() + piece.start // size)


def _read_at(fd: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise OSError("the file has become shorter while it was read")
        offset, view = offset + count, view[count:]


def _gather(data: Tensor, plan: AdapterPlan) -> Tensor:
    """The file's data as the plan wants it in memory."""
    gathered = torch.empty(plan.nbytes, dtype=torch.uint8)
    for one in plan.segments:
        gathered[one.in_memory : one.in_memory + one.nbytes] = data[one.in_file : one.in_file + one.nbytes]
    return gathered


def _is_finite(host: TorchHostAdapter) -> bool:
    """By the largest magnitude as bits, which NaN and infinity exceed. In numpy: torch's threads are the engine's."""
    used = [name for name, ranks in host.module_ranks.items() if any(ranks)]
    return all(_largest_bits(side[name]) < _INFINITE[side[name].dtype] for name in used for side in (host.a, host.b))


def _largest_bits(tensor: Tensor) -> int:
    bits = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy()
    return int((bits & np.iinfo(bits.dtype).max).max())


def _infinite_tensors(host: TorchHostAdapter, layout: Layout) -> list[str]:
    names = []
    for projection, modules in layout.modules.items():
        for index, (module, (low, high)) in enumerate(zip(modules, pairwise(layout.offsets[projection]), strict=True)):
            for layer in range(layout.layers):
                sides = host.a[projection][layer, index], host.b[projection][layer, :, low:high]
                names += [
                    tensor_name(layer, module, is_a=is_a)
                    for is_a, side in zip((True, False), sides, strict=True)
                    if not side.isfinite().all()
                ]
    return names
