"""The base out of a server's memory: the same bits as a base of one's own, held once, and gone with its server."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from onebase.base_model import LoadedBase, dequantized, linear4bit_modules, load_base
from onebase.bases import resolve_base
from onebase.errors import InvalidInput
from onebase.home import Home
from onebase.serving_note import ServerNote, living_servers
from onebase.shared_tensors import hold_on_file, map_file
from onebase.store import AdapterStore
from onebase_server.engine.runner_torch import RunnerConfig, build_runner
from onebase_server.engine.share_weights import share_on_file
from onebase_server.kernels.cpu_ops import CpuKernels, cpu_kernels
from onebase_server.kernels.cuda_tiles import CODE_SCALE, fold, repack
from onebase_server.kernels.ops import NF4Weight
from onebase_training import beside, shared_base
from onebase_training.beside import Beside
from onebase_training.config import make_recipe
from onebase_training.shared_base import Borrowed, find_shared
from onebase_training.status import StatusWriter
from onebase_training.stop import ServerGone
from onebase_training.train import Run, RunOptions, RunResult, carry_out
from onebase_training.unpacking import TiledRows
from tiny_base import NAME, recipe, sharegpt_file

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, CpuKernels]:
    cache = tmp_path_factory.mktemp("kernels")
    made = {dtype: cpu_kernels(cache, dtype) for dtype in (torch.bfloat16, torch.float32)}
    return {dtype: found for dtype, found in made.items() if found is not None}


class Serving:
    """A server on a home as far as training can see it; its runner's weights lie in the shared file."""

    def __init__(self, home: Home, kernels: CpuKernels, dtype: Any = "bfloat16") -> None:
        self.note = ServerNote.open(home.serving)
        self.base = load_base(resolve_base(home, NAME), compute_dtype=dtype)
        self.description: dict[str, Any] = {}

        def place(weights: Any) -> Any:
            placed, self.description = share_on_file(weights, kernels, self.base.spec.identity, home.cache)
            return placed

        self.runner = build_runner(self.base, kernels, RunnerConfig(num_pages=8), place=place)
        self.note.ready(self.description)


@pytest.fixture
def serving(home: Home, kernels: dict[torch.dtype, CpuKernels]) -> Iterator[Serving]:
    if torch.bfloat16 not in kernels:
        pytest.skip("no C++ compiler")
    served = Serving(home, kernels[torch.bfloat16])
    yield served
    served.note.close()


def borrowed(home: Home, dtype: str = "bfloat16") -> LoadedBase:
    spec = resolve_base(home, NAME)
    found = find_shared(home.serving, spec, CPU)
    assert found is not None
    return found.load(spec, load_base(spec).tokenizer, CPU, getattr(torch, dtype))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def require_equal(own: LoadedBase, other: LoadedBase) -> None:
    linears, shared = linear4bit_modules(own.model), linear4bit_modules(other.model)
    assert list(linears) == list(shared)
    for name, module in linears.items():
        for dtype in (torch.bfloat16, torch.float32):
            assert same_bits(dequantized(module, dtype), dequantized(shared[name], dtype)), name
    plain = {n: p for n, p in own.model.named_parameters() if p.is_floating_point()}
    others = dict(other.model.named_parameters())
    assert all(same_bits(p, others[n]) for n, p in plain.items())
    assert [n for n, _ in own.model.named_buffers()] == [n for n, _ in other.model.named_buffers()]
    assert all(same_bits(p, q) for p, q in zip(own.model.buffers(), other.model.buffers(), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("serves", ["bfloat16", "float32"])
def test_every_value_is_that_of_an_own_base(
    home: Home, kernels: dict[torch.dtype, CpuKernels], serves: str, dtype: Any
) -> None:
    if not kernels:
        pytest.skip("no C++ compiler")
    served = Serving(home, kernels[getattr(torch, serves)], serves)
    require_equal(load_base(resolve_base(home, NAME), compute_dtype=dtype), borrowed(home, dtype))
    served.note.close()


def test_the_forward_pass_and_its_gradient_are_those_of_an_own_base(home: Home, serving: Serving) -> None:
    results = []
    for base in (load_base(resolve_base(home, NAME)), borrowed(home)):
        x = base.model.get_input_embeddings()(torch.arange(5, 25)[None]).detach().requires_grad_()
        logits = base.model(inputs_embeds=x).logits
        logits.float().square().sum().backward()
        results.append((logits.detach(), x.grad))
    (logits, grad), (others, other_grad) = results
    assert same_bits(logits, others)
    assert grad is not None
    assert other_grad is not None
    torch.testing.assert_close(grad, other_grad, rtol=2e-2, atol=1e-4)


def train(home: Home, run: str, options: RunOptions | None = None) -> RunResult:
    data = sharegpt_file(home.root.parent / "data.jsonl")
    content = recipe(data, compute={"dtype": "bfloat16"}, train={"max_steps": 4}, lora={"target_modules": ["q_proj"]})
    folder = home.root.parent / run
    status = StatusWriter(folder / "status.json")
    return carry_out(Run(make_recipe(content), home, folder, status, Console(quiet=True), options or RunOptions()))


def weights(home: Home, result: RunResult) -> bytes:
    assert result.version is not None
    return (AdapterStore(home.adapters).resolve(result.version.id).path / "adapter_model.safetensors").read_bytes()


def test_a_run_on_a_busy_servers_base_learns_the_very_bits_that_it_learns_alone(
    home: Home, kernels: dict[torch.dtype, CpuKernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.bfloat16 not in kernels:
        pytest.skip("no C++ compiler")
    alone = weights(home, train(home, "alone"))
    served = Serving(home, kernels[torch.bfloat16])
    over = threading.Event()

    def serve() -> None:
        steps = 0
        while not over.wait(0.001):
            steps += 1
            served.note.tell(1, 0, steps)

    thread = threading.Thread(target=serve)
    thread.start()
    monkeypatch.setattr(beside, "load_base", lambda *a, **k: pytest.fail("it loaded a base of its own"))
    try:
        result = train(home, "beside", RunOptions(policy="fair"))
    finally:
        over.set()
        thread.join()
        served.note.close()
    assert result.metrics["waited_s"]
    assert weights(home, result) == alone


def test_without_a_fitting_server_a_run_loads_its_own(home: Home, serving: Serving) -> None:
    spec = resolve_base(home, NAME)
    assert find_shared(home.serving, spec, torch.device("cuda:0")) is None
    for changed in ({"base": {**serving.description["base"], "revision": "other"}}, {"layout": "unheard of"}):
        serving.note.ready({**serving.description, **changed})
        assert find_shared(home.serving, spec, CPU) is None
    serving.note.ready({**serving.description, "file": str(home.cache / "gone.safetensors")})
    assert find_shared(home.serving, spec, CPU) is not None
    own = Beside(home.serving, "fair", CPU).load_base(spec, load_base(spec).tokenizer, "bfloat16")
    assert not own.is_shared
    serving.note.close()
    assert find_shared(home.serving, spec, CPU) is None


def test_a_run_waits_for_a_server_that_is_loading(home: Home, kernels: dict[torch.dtype, CpuKernels]) -> None:
    note = ServerNote.open(home.serving)
    spec = resolve_base(home, NAME)
    description = {"device": "cpu", "layout": "strips", "base": spec.identity.model_dump(mode="json")}
    signs: list[bool] = []

    def on_wait() -> None:
        signs.append(True)
        if len(signs) == 2:
            note.ready(description)

    assert find_shared(home.serving, spec, CPU, on_wait=on_wait) is not None
    assert len(signs) == 2
    note.close()
    loading = ServerNote.open(home.serving)
    assert find_shared(home.serving, spec, CPU, loading_s=0.0) is None
    loading.close()


def test_memory_that_goes_with_its_server_is_not_trusted_after_it(home: Home, tmp_path: Path) -> None:
    """CUDA's case, without CUDA: handles die with the process that gave them, a mapped file does not."""
    code = (
        "import sys, time; from pathlib import Path; from onebase.serving_note import ServerNote\n"
        f"ServerNote.open(Path({str(home.serving)!r})).ready({{'device': 'cuda:0'}}); print('up', flush=True)\n"
        "time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(shared_base.__file__).parents[2] / "core")}
    server = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"up\n"
    (seen,) = living_servers(home.serving).values()
    on_device, on_file = Borrowed(seen, {"handles": {}}), Borrowed(seen, {"file": "x"})
    on_device.require_owner()
    server.kill()
    server.wait()
    server.stdout.close()
    on_file.require_owner()
    with pytest.raises(ServerGone, match="has ended"):
        on_device.require_owner()


def test_a_run_whose_base_goes_publishes_nothing_and_may_be_resumed(
    home: Home, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def gone(self: Borrowed) -> None:
        nonlocal asked
        asked += 1
        if asked > 20:
            raise ServerGone("the server that held the base has ended")

    monkeypatch.setattr(Borrowed, "require_owner", gone)
    with pytest.raises(ServerGone):
        train(home, "run")
    status = (home.root.parent / "run/status.json").read_text()
    assert '"state": "failed"' not in status
    assert AdapterStore(home.adapters).list() == []
    monkeypatch.undo()
    assert train(home, "run", RunOptions(resume=True)).version is not None


@pytest.mark.parametrize(("n", "k", "folds"), [(64, 64, False), (192, 320, False), (96, 192, False), (128, 256, True)])
def test_the_rows_of_cudas_tiles_come_back(n: int, k: int, folds: bool) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(torch.randn(n, k, dtype=torch.bfloat16), quant_type="nf4", blocksize=64)
    assert isinstance(state, QuantState)
    whole = dequantize_4bit(packed, state).view(n, k)
    weight = NF4Weight(packed.view(n, k // 2), state.absmax.view(n, k // 64), (n, k), state.code)
    tiles = fold(repack(weight), n) if folds else repack(weight)
    parts = [(0, n // 2, 0), (n // 2, n // 2, 1)] if folds else [(0, n, None), (n // 2, n - n // 2, None)]
    for first, rows, turn in parts:
        values = TiledRows(tiles.data, state.code, CODE_SCALE, first, (rows, k), turn)(torch.bfloat16)
        wanted = whole[first : first + rows]
        assert (values != wanted).float().mean() < 0.01  # absmax has been through a division: seldom 1 ulp of bf16
        torch.testing.assert_close(values, wanted, rtol=2**-7, atol=0)


def test_a_shared_file_is_written_anew_unless_it_holds_just_these_values(tmp_path: Path) -> None:
    path = tmp_path / "cache/shared.safetensors"
    tensors = {
        "odd": torch.arange(7, dtype=torch.float32),
        "bytes": torch.arange(128, dtype=torch.uint8).view(2, 64),
        "narrow": torch.randn(3, 32).bfloat16(),
    }
    held = hold_on_file(path, tensors)
    first = path.stat()
    assert all(same_bits(held[name], tensor) for name, tensor in tensors.items())
    assert held["bytes"].data_ptr() % 64 == held["narrow"].data_ptr() % 64 == 0
    hold_on_file(path, tensors)
    assert path.stat().st_ino == first.st_ino
    changed = {**tensors, "odd": torch.full((7,), float("nan"))}
    assert same_bits(hold_on_file(path, changed)["odd"], changed["odd"])
    assert path.stat().st_ino != first.st_ino
    assert same_bits(held["odd"], tensors["odd"])  # who has the old file keeps it
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="cut off"):
        map_file(path)
    assert same_bits(hold_on_file(path, tensors)["narrow"], tensors["narrow"])


def test_what_one_process_writes_into_the_shared_weights_no_other_sees(tmp_path: Path) -> None:
    path = tmp_path / "shared.safetensors"
    mine = hold_on_file(path, {"w": torch.zeros(64)})["w"]
    other = map_file(path)["w"]
    mine.fill_(1)
    assert not other.any()
    assert not map_file(path)["w"].any()
