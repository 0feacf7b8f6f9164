"""Tiny models quantised by bitsandbytes, through the CUDA runner, against transformers' own forward on that device."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SIZES = {"num_pages": 64, "num_slots": 2, "max_lora_rank": 8, "max_batch_sequences": 8, "max_context": 256}


@pytest.fixture(autouse=True, scope="module")
def _libraries() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("transformers")


def _on_cuda(where: Path, dtype):
    """As `tiny_models.load_nf4`, quantised on the device."""
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, quantization_config=settings, device_map={"": 0}
    ).eval()


def _base(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    import torch

    import tiny_models

    monkeypatch.setattr(tiny_models, "load_nf4", _on_cuda)

    if name == "llama_64":
        import transformers

        tiny_models.CONFIGS[name] = lambda: transformers.LlamaConfig(**tiny_models.SIZES, head_dim=64)
    model = tiny_models.tiny_model(folder, name, torch.bfloat16)
    tokenizer = SimpleNamespace(eos_ids=frozenset({2}))
    return SimpleNamespace(model=model, tokenizer=tokenizer, spec=SimpleNamespace(id=name, identity=None))


@pytest.mark.parametrize("name", ["llama_64", "qwen3", "qwen2", "llama"])
def test_logprobs_follow_transformers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama_64: fused forward; qwen3: graphs with norms of q and k; qwen2 and llama (heads of 32): no graphs."""
    from onebase_server.engine.build_cuda import build_cuda_runner
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.engine.runner_torch import RunnerConfig

    base = _base(tmp_path, name, monkeypatch)
    runner = build_cuda_runner(base, RunnerConfig(**SIZES), identity=None)
    assert isinstance(runner, CudaRunner) == (name in ("llama_64", "qwen3"))
    _follow(base.model, runner)


@pytest.mark.parametrize("missing", ["NVRTC", "a compiler that works"])
def test_logprobs_follow_transformers_where_our_kernels_can_not_be_built(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onebase_server.engine.build_cuda import build_cuda_runner
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.engine.runner_torch import RunnerConfig
    from onebase_server.kernels import cuda_build
    from onebase_server.kernels.cuda_bnb import BnbMatmul

    def fail(*_):
        raise cuda_build.CudaBuildError("not here")

    base = _base(tmp_path, "llama_64", monkeypatch)
    monkeypatch.setattr(cuda_build, "_nvrtc" if missing == "NVRTC" else "compile_cubin", fail)
    runner = build_cuda_runner(base, RunnerConfig(**SIZES), identity=None)
    assert not isinstance(runner, CudaRunner)
    assert isinstance(runner.weights.layers[0].projections["qkv"].weight.repacked, BnbMatmul)
    _follow(base.model, runner)


def test_the_bases_own_weights_go_as_the_runners_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase_server.engine.build_cuda import build_cuda_runner
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.engine.runner_torch import RunnerConfig

    base, reference = (_base(tmp_path, "llama_64", monkeypatch) for _ in range(2))
    asked = []

    def num_pages(free: int, has_graphs: bool) -> int:
        asked.append((free > 0, has_graphs))
        return 48

    runner = build_cuda_runner(base, RunnerConfig(**SIZES), identity=None, num_pages=num_pages, release=True)
    assert isinstance(runner, CudaRunner)
    assert asked == [(True, True)]
    assert runner.limits.num_pages == 48
    assert runner.num_graphs > 0
    assert base.model.model.layers[0].self_attn.q_proj.weight is None
    _follow(reference.model, runner)


def _follow(model, runner) -> None:
    """Logprobs of five steps of three sequences are those of transformers."""
    import torch

    from gpu_runners import Sequence, make_batch

    live = [Sequence(i, [(7 * i + 3 * j) % 300 + 5 for j in range(12 + 9 * i)], -1) for i in range(3)]
    free = list(range(runner.limits.num_pages))
    for _ in range(5):
        result = runner.run(make_batch(live, free, top_logprobs=4))
        for i, s in enumerate(live):
            with torch.no_grad():
                logits = model(torch.tensor([s.ids], device="cuda")).logits[0, -1].float()
            expected = logits.log_softmax(-1)
            ids = torch.from_numpy(result.top_ids[i]).long().cuda()
            ours = torch.from_numpy(result.top_logprobs[i]).cuda()
            assert (expected[ids] - ours).abs().max() < 0.15, i
            s.ids.append(int(expected.argmax()))


def test_bitsandbytes_multiplies_where_tiles_do_not_fit() -> None:
    import torch

    from nf4_weights import exact, random_weight, relative_error
    from onebase_server.kernels.cuda_bnb import BnbMatmul

    weight = random_weight(256, 512)
    for m in (1, 4, 40):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        assert relative_error(BnbMatmul(weight)(x), x.double() @ exact(weight).T) < 6e-3
