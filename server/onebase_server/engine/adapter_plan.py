"""Where each tensor of an adapter's file goes: from the file's data to layers and rank rows of the pools. Numbers only.

Layers of a module whose tensors lie at an even distance in the file make one piece, which a single strided copy can
move; what differs in rank, type or scaling begins another. It must not know tensors, devices or slots.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from onebase.safetensors_header import DTYPE_BYTES, TensorInfo

ALIGNMENT = 16
"""Bytes: chunks, and tensors that had to be moved in memory, begin at multiples."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The base's sizes as far as adapters care. `modules`: fused projection -> its modules' paths within a layer,
    as in `PROJECTIONS`; `columns`: K; `offsets`: borders of the modules along N."""

    layers: int
    modules: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, int]
    offsets: Mapping[str, tuple[int, ...]]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every linear that a LoRA may target."""
        return {
            f"model.layers.{layer}.{module}": (high - low, self.columns[name])
            for layer in range(self.layers)
            for name, modules in self.modules.items()
            for module, (low, high) in zip(modules, pairwise(self.offsets[name]), strict=True)
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """The tensors of one side of one module, in `count` layers from `layer` on."""

    projection: str
    module: int
    """Which of the projection's modules."""
    is_a: bool  # lora_A [rank, K], else lora_B [N, rank]
    layer: int
    count: int
    rank: int
    low: int  # of lora_B's N columns in the pool: low .. high; of lora_A's: 0 .. K
    high: int
    dtype: str
    scaling: float  # folded into lora_B; 1 for lora_A
    start: int  # bytes from the chunk's start
    stride: int  # bytes from one layer's tensor to the next one's


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes start .. end of the data in memory: whole tensors, and where they go."""

    start: int
    end: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of the file's data that lie together in memory too."""

    in_file: int
    in_memory: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """`rank`: the largest of all modules. Smaller modules fill their first rows."""

    rank: int
    module_ranks: Mapping[str, tuple[int, ...]]
    """Projection -> the largest rank of each of its modules, 0 where not targeted."""
    complete: frozenset[str]
    """Projections whose every row is written; the others need zeros first."""
    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    nbytes: int


@dataclass(slots=True)
class _Placed:
    """One tensor, `start` being its place in memory."""

    piece: Piece
    start: int
    end: int


def make_plan(
    tensors: Mapping[str, TensorInfo],
    scaling: Callable[[str], float],
    layout: Layout,
    *,
    chunk_bytes: int | None = None,
    longest_run: int | None = None,
) -> AdapterPlan:
    """`tensors` have been validated against `layout`; `scaling(module path)` is PEFT's. At most `chunk_bytes` to a
    chunk (a larger tensor has one to itself) and `longest_run` layers to a piece."""
    segments, where = _place(tensors)
    placed = [
        _Placed(piece, where[name], where[name] + tensors[name].end - tensors[name].start)
        for name, piece in _single_pieces(tensors, scaling, layout)
    ]
    rank = max(one.piece.rank for one in placed)
    ranks = {name: [0] * len(modules) for name, modules in layout.modules.items()}
    covered = dict.fromkeys(layout.modules, 0)
    for piece in (one.piece for one in placed):
        own = ranks[piece.projection]
        own[piece.module] = max(own[piece.module], piece.rank)
        covered[piece.projection] += piece.rank
    return AdapterPlan(
        rank=rank,
        module_ranks={name: tuple(own) for name, own in ranks.items()},
        complete=frozenset(n for n, m in layout.modules.items() if covered[n] == 2 * rank * layout.layers * len(m)),
        segments=segments,
        chunks=tuple(_chunks(placed, chunk_bytes, longest_run)),
        nbytes=max((one.in_memory + one.nbytes for one in segments), default=0),
    )


def tensor_name(layer: int, module: str, *, is_a: bool) -> str:
    """PEFT's name of a module's tensor."""
    return f"base_model.model.model.layers.{layer}.{module}.lora_{'A' if is_a else 'B'}.weight"


def _place(tensors: Mapping[str, TensorInfo]) -> tuple[tuple[Segment, ...], dict[str, int]]:
    """Memory as the file is, in one piece; if some tensor would lie askew for its type, one by one."""
    if all(tensor.start % DTYPE_BYTES[tensor.dtype] == 0 for tensor in tensors.values()):
        whole = Segment(0, 0, max(tensor.end for tensor in tensors.values()))
        return (whole,), {name: tensor.start for name, tensor in tensors.items()}
    segments, where, at = [], {}, 0
    for name, tensor in tensors.items():
        where[name] = at
        segments.append(Segment(tensor.start, at, tensor.end - tensor.start))
        at = -(-(at + tensor.end - tensor.start) // ALIGNMENT) * ALIGNMENT
    return tuple(segments), where


def _single_pieces(
    tensors: Mapping[str, TensorInfo], scaling: Callable[[str], float], layout: Layout
) -> Iterator[tuple[str, Piece]]:
    """A piece for each tensor, by the tensor's name; modules in order and, in each, layers in order."""
    for projection, modules in layout.modules.items():
        columns, offsets = layout.columns[projection], layout.offsets[projection]
        for index, module in enumerate(modules):
            for layer in range(layout.layers):
                name = tensor_name(layer, module, is_a=True)
                if name not in tensors:
                    continue
                a, b = tensors[name], tensors[other := tensor_name(layer, module, is_a=False)]
                factor, rank = scaling(f"model.layers.{layer}.{module}"), a.shape[0]
                low, high = offsets[index], offsets[index + 1]
                yield name, Piece(projection, index, True, layer, 1, rank, 0, columns, a.dtype, 1.0, 0, 0)
                yield other, Piece(projection, index, False, layer, 1, rank, low, high, b.dtype, factor, 0, 0)


def _chunks(placed: list[_Placed], chunk_bytes: int | None, longest_run: int | None) -> Iterator[Chunk]:
    waiting: list[_Placed] = []
    begin = 0
    for one in sorted(placed, key=lambda one: one.start):
        if waiting and chunk_bytes is not None and one.end - begin > chunk_bytes:
            yield Chunk(begin, waiting[-1].end, tuple(_join(waiting, begin, longest_run)))
            waiting = []
        if not waiting:
            begin = one.start // ALIGNMENT * ALIGNMENT
        waiting.append(one)
    yield Chunk(begin, waiting[-1].end, tuple(_join(waiting, begin, longest_run)))


def _join(placed: list[_Placed], begin: int, longest_run: int | None) -> Iterator[Piece]:
    """Pieces of several layers, as far as these lie at one distance and agree in everything else."""
    groups: dict[tuple[object, ...], list[_Placed]] = {}
    for one in placed:
        p = one.piece
        key = (p.projection, p.module, p.is_a, p.rank, p.dtype, p.scaling)
        groups.setdefault(key, []).append(one)
    for group in groups.values():
        group.sort(key=lambda one: one.piece.layer)
        run: list[_Placed] = []
        for one in group:
            if run and (len(run) == longest_run or not _goes_on(run, one)):
                yield _joined(run, begin)
                run = []
            run.append(one)
        yield _joined(run, begin)


def _goes_on(run: list[_Placed], one: _Placed) -> bool:
    stride = one.start - run[-1].start
    if one.piece.layer != run[-1].piece.layer + 1 or stride <= 0 or stride % DTYPE_BYTES[one.piece.dtype]:
        return False
    return len(run) == 1 or stride == run[-1].start - run[-2].start


def _joined(run: list[_Placed], begin: int) -> Piece:
    first = run[0].piece
    return Piece(
        projection=first.projection,
        module=first.module,
        is_a=first.is_a,
        layer=first.layer,
        count=len(run),
        rank=first.rank,
        low=first.low,
        high=first.high,
        dtype=first.dtype,
        scaling=first.scaling,
        start=run[0].start - begin,
        stride=run[1].start - run[0].start if len(run) > 1 else 0,
    )
