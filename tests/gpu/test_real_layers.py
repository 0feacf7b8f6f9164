"""Tiny models quantised by bitsandbytes, through the CUDA runner, against transformers' own forward on that device."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


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
    import torch

    from gpu_runners import Sequence, make_batch
    from onebase_server.engine.runner_cuda import CudaRunner, build_cuda_runner
    from onebase_server.engine.runner_torch import RunnerConfig

    base = _base(tmp_path, name, monkeypatch)
    config = RunnerConfig(num_pages=64, num_slots=2, max_lora_rank=8, max_batch_sequences=8, max_context=256)
    runner = build_cuda_runner(base, config, identity=None)
    assert isinstance(runner, CudaRunner) == (name in ("llama_64", "qwen3"))
    live = [Sequence(i, [(7 * i + 3 * j) % 300 + 5 for j in range(12 + 9 * i)], -1) for i in range(3)]
    free = list(range(64))
    for _ in range(5):
        result = runner.run(make_batch(live, free, top_logprobs=4))
        for i, s in enumerate(live):
            with torch.no_grad():
                logits = base.model(torch.tensor([s.ids], device="cuda")).logits[0, -1].float()
            expected = logits.log_softmax(-1)
            ids = torch.from_numpy(result.top_ids[i]).long().cuda()
            ours = torch.from_numpy(result.top_logprobs[i]).cuda()
            assert (expected[ids] - ours).abs().max() < 0.15, (name, i)
            s.ids.append(int(expected.argmax()))


def test_bitsandbytes_multiplies_where_tiles_do_not_fit() -> None:
    import torch

    from nf4_weights import exact, random_weight, relative_error
    from onebase_server.kernels.cuda_bnb import BnbMatmul

    weight = random_weight(256, 512)
    for m in (1, 4, 40):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        assert relative_error(BnbMatmul(weight)(x), x.double() @ exact(weight).T) < 6e-3
