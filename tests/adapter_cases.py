"""PEFT folders of every shape that loading has to get right, over a small base without weights; and what must come out,
computed tensor by tensor in the obvious way. Shared by the tests on a CPU and on a GPU."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from onebase.lora_config import LoraConfigData
from onebase_server.engine.host_adapter import layout_of
from onebase_server.engine.host_memory import HostMemory
from onebase_server.engine.lora_slots import LoraSlots
from onebase_server.engine.slot_loader import StreamLoader
from onebase_server.engine.weights import PROJECTIONS, Geometry, LayerWeights, ModelWeights, Projection
from onebase_server.kernels.ops import NF4Weight

LAYERS, HIDDEN, KV, INNER, MAX_RANK = 12, 64, 32, 96, 16  # twelve layers: "10" comes before "2" in a file
ROWS = 40
NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def bare_weights(device: str, dtype: torch.dtype) -> ModelWeights:
    """Sizes only."""

    def projection(*rows: int, k: int) -> Projection:
        offsets = [0]
        for n in rows:
            offsets.append(offsets[-1] + n)
        nothing = torch.zeros(0)
        return Projection(NF4Weight(nothing, nothing, (offsets[-1], k), nothing), None, tuple(offsets))

    nothing = torch.zeros(0, dtype=dtype, device=device)
    projections = {
        "qkv": projection(HIDDEN, KV, KV, k=HIDDEN),
        "o": projection(HIDDEN, k=HIDDEN),
        "gate_up": projection(INNER, INNER, k=HIDDEN),
        "down": projection(HIDDEN, k=INNER),
    }
    layers = [LayerWeights(nothing, nothing, None, None, projections) for _ in range(LAYERS)]
    geometry = Geometry(LAYERS, HIDDEN, 4, 2, 16, INNER, 320, 1e-6, 64)
    return ModelWeights(geometry, nothing, layers, nothing, nothing, nothing, nothing)


@dataclass(frozen=True)
class Case:
    """`dtype_of(layer, module)` names the file's type; `skip` says which modules the adapter lacks."""

    name: str
    config: dict[str, object] = field(default_factory=dict)
    dtype_of: Callable[[int, str], str] = lambda layer, module: "F32"
    skip: Callable[[int, str], bool] = lambda layer, module: False
    askew: bool = False
    """Tensors lie at odd addresses in the file."""


ATTENTION = ["q_proj", "k_proj", "v_proj"]
ALL = [*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [
    Case("fp32"),
    Case("fp16", {"target_modules": ALL}, lambda layer, module: "F16"),
    Case("bf16", {"target_modules": ALL, "r": 16}, lambda layer, module: "BF16"),
    Case("odd rank", {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}),
    Case("rank one", {"r": 1, "use_rslora": True, "target_modules": ALL}),
    Case("rank_pattern", {"r": 6, "rank_pattern": {"k_proj": 3, r"layers\.[5-8]\.self_attn\.v_proj": 11}}),
    Case("alpha_pattern", {"r": 9, "alpha_pattern": {r"layers\.(1|7)\..*": 3.7}}),
    Case("layers missing", {"target_modules": ALL}, skip=lambda layer, module: layer % 3 == 1 or "up" in module),
    Case("one layer", skip=lambda layer, module: layer != 7),
    Case(
        "types mixed", {"target_modules": ALL}, lambda layer, module: ("F32", "BF16", "F16")[(layer + len(module)) % 3]
    ),
    Case("askew", {"r": 3}, lambda layer, module: "F32" if layer % 2 else "BF16", askew=True),
]


def write_case(folder: Path, case: Case, seed: int = 0, spoil: dict[str, float] | None = None) -> dict[str, Tensor]:
    """The folder's files; its tensors by name. `spoil`: one value of each of these tensors."""
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ATTENTION, **case.config}
    parsed = LoraConfigData.parse(config)
    tensors = {}
    for path, n, k in _modules():
        layer, module = int(path.split(".")[2]), path.split(".", 3)[3]
        if not parsed.targets(path) or case.skip(layer, module):
            continue
        r, dtype = parsed.rank(path), NAMES[case.dtype_of(layer, module)]
        for side, shape in (("A", (r, k)), ("B", (n, r))):
            values = torch.randn(shape, generator=generator) * torch.rand(1, generator=generator)
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = values.to(dtype)
    for name, value in (spoil or {}).items():
        tensors[name].view(-1)[-1] = value
    folder.mkdir(parents=True)
    raw = _askew(tensors) if case.askew else save(tensors, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(raw)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def expected(
    folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(rank, a, b) as the pools must hold it."""
    config = LoraConfigData.read(folder / "adapter_config.json")
    rank = max(t.shape[0] for name, t in tensors.items() if ".lora_A." in name)
    weights = bare_weights("cpu", dtype)
    a, b = {}, {}
    for projection, modules in PROJECTIONS.items():
        own = weights.layers[0].projections[projection]
        n, k = own.weight.shape
        a[projection] = torch.zeros(LAYERS, len(modules), rank, k, dtype=dtype)
        b[projection] = torch.zeros(LAYERS, rank, n, dtype=dtype)
        for layer in range(LAYERS):
            for i, module in enumerate(modules):
                path = f"model.layers.{layer}.{module}"
                down = tensors.get(f"base_model.model.{path}.lora_A.weight")
                if down is None:
                    continue
                up = tensors[f"base_model.model.{path}.lora_B.weight"]
                a[projection][layer, i, : len(down)] = down.to(dtype)
                scaled = (up.float() * config.scaling(path)).to(dtype)
                b[projection][layer, : len(down), own.offsets[i] : own.offsets[i + 1]] = scaled.T
    return rank, a, b


def make_loader(device: str, streams: object, *, chunk_bytes: int = 1 << 20, arena: int = 1 << 20, rows: int = ROWS):
    """A loader whose slots hold garbage."""
    weights = bare_weights(device, torch.bfloat16)
    slots = LoraSlots(weights, rows)
    for pool in (*slots.a.values(), *slots.b.values()):
        pool.fill_(float("nan"))
    loader = StreamLoader(
        slots,
        layout_of(weights),
        None,
        num_slots=8,
        max_rank=MAX_RANK,
        streams=streams,
        memory=HostMemory(arena, pin=device == "cuda"),
        chunk_bytes=chunk_bytes,
    )
    return slots, loader


class Now:
    """`Streams` of a device that does everything at once."""

    @contextmanager
    def copying(self) -> Iterator[None]:
        yield

    def copies_wait(self) -> None: ...

    def compute_waits(self) -> None: ...

    def record(self) -> "Now":
        return self

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


def check_slot(slots: LoraSlots, slot: int, folder: Path, tensors: dict[str, Tensor]) -> None:
    """The slot's rows are bit for bit what they must be."""
    rank, a, b = expected(folder, tensors, torch.bfloat16)
    own = slots.owner(slot)
    assert own is not None
    assert own.rank == rank
    for name in slots.a:
        assert torch.equal(slots.a[name][:, :, own.span].cpu(), a[name]), name
        assert torch.equal(slots.b[name][:, own.span].cpu(), b[name]), name


def _modules() -> Iterator[tuple[str, int, int]]:
    weights = bare_weights("cpu", torch.float32)
    for layer in range(LAYERS):
        for name, modules in PROJECTIONS.items():
            own = weights.layers[0].projections[name]
            for i, module in enumerate(modules):
                yield f"model.layers.{layer}.{module}", own.offsets[i + 1] - own.offsets[i], own.weight.shape[1]


def _askew(tensors: dict[str, Tensor]) -> bytes:
    """A sound file whose writer did not care for alignment: bf16 of odd sizes before fp32, a header of odd length."""
    header, data, at = {}, b"", 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        kind = next(key for key, dtype in NAMES.items() if dtype == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)]}
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    return len(text).to_bytes(8, "little") + text + data
