"""CUDA: a second process trains on the first one's weights through IPC handles, and notices when they have gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

SERVER = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from onebase.base_model import load_base
from onebase.bases import resolve_base
from onebase.home import Home
from onebase.serving_note import ServerNote
from onebase_server.engine.build_cuda import build_cuda_runner
from onebase_server.engine.runner_torch import RunnerConfig
from onebase_server.engine.share_weights import describe_cuda

home = Home(Path({home!r}))
note = ServerNote.open(home.serving)
spec = resolve_base(home, "tiny-llama")
base = load_base(spec, "cuda")
runner = build_cuda_runner(base, RunnerConfig(num_pages=64, num_slots=2, lora_rows=32), cache_dir=home.cache)
del base
note.ready(describe_cuda(runner.weights, spec.identity))
torch.cuda.synchronize()
print("up", flush=True)
sys.stdin.read()
"""

PATHS = os.pathsep.join(str(ROOT / part) for part in ("core", "server", "training"))


def test_handles_give_a_second_process_the_same_values_and_it_notices_the_servers_death(tmp_path: Path) -> None:

    import torch

    from onebase.base_model import dequantized, linear4bit_modules, load_base
    from onebase_training.shared_base import find_shared
    from onebase_training.stop import ServerGone
    from tiny_base import tiny_base

    home, spec = tiny_base(tmp_path, hidden=256)
    own = load_base(spec, "cuda")
    code = SERVER.format(tests=str(ROOT / "tests"), home=str(home.root))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([PATHS, os.environ.get("PYTHONPATH", "")])}
    server = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        described = json.loads(next(home.serving.glob("*.json")).read_text())
        assert described["layout"] in ("tiles", "tiles-folded"), "a head size that our kernels don't take?"
        device = torch.device("cuda:0")
        before = torch.cuda.memory_allocated()
        borrowed = find_shared(home.serving, spec, device)
        assert borrowed is not None
        shared = borrowed.load(spec, own.tokenizer, device, torch.bfloat16)
        assert torch.cuda.memory_allocated() - before < 1 << 20, "opening the handles allocated a copy"

        theirs = linear4bit_modules(shared.model)
        for name, module in linear4bit_modules(own.model).items():
            values, wanted = dequantized(theirs[name], torch.bfloat16), dequantized(module, torch.bfloat16)
            torch.testing.assert_close(values, wanted, rtol=2**-7, atol=0)
        ids = torch.arange(5, 37, device=device)[None]
        logits, wanted_logits = shared.model(ids).logits.float(), own.model(ids).logits.float()
        assert (logits - wanted_logits).abs().mean() < 0.02 * wanted_logits.abs().mean()
        borrowed.require_owner()
    finally:
        server.kill()
        server.communicate()
    with pytest.raises(ServerGone):
        borrowed.require_owner()


@pytest.mark.parametrize("layers", [1, 4])
def test_the_host_is_held_to_so_many_layers_ahead_of_the_device(layers: int) -> None:
    import torch

    from onebase_training.boundaries import _Pace

    pace = _Pace()
    events = []
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        for _ in range(20):
            busy = busy @ busy
            busy /= busy.norm()
        done = torch.cuda.Event()
        done.record()
        events.append(done)
        pace.keep(layers)
    assert all(event.query() for event in events[: -layers - 1]), f"the host ran more than {layers} layers ahead"
