"""Batched LoRA on CUDA against fp64: mixed ranks, bare rows, fused projections, decode and prefill kernels."""

from itertools import pairwise

import pytest

from nf4_weights import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def _meta(starts, ranks, max_query: int, max_rank: int):
    import torch

    from onebase_server.kernels.ops import StepMeta

    none = torch.empty(0, device="cuda")
    return StepMeta(none, none, none, none, none, none, starts, ranks, True, max_rank, max_query, 1)


@pytest.mark.parametrize("tokens", [1, 2, 7, 32, 128, 129, 150, 517])
@pytest.mark.parametrize(
    ("k", "offsets"), [(4096, (0, 4096, 8192, 12288)), (576, (0, 576, 768, 960)), (1536, (0, 576)), (11008, (0, 4096))]
)
def test_equals_fp64_for_mixed_adapters(kernels, tokens: int, k: int, offsets: tuple[int, ...]) -> None:
    import torch

    from onebase_server.kernels.ops import LoraPool

    n, rows = offsets[-1], 200
    pool = LoraPool(
        torch.randn(len(offsets) - 1, rows, k, device="cuda", dtype=torch.bfloat16) * 0.02,
        torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) * 0.02,
        offsets,
    )
    a, b = pool.a.double(), pool.b.double()
    adapters = torch.tensor([[0, 0], [0, 8], [8, 1], [9, 64], [73, 17], [90, 100]], device="cuda", dtype=torch.int32)
    for runs in (False, True):  # each token its own adapter; runs of neighbours
        pick = torch.randint(0, len(adapters), (tokens,), device="cuda")
        if runs:
            pick = pick.sort().values
        starts, ranks = adapters[pick, 0].contiguous(), adapters[pick, 1].contiguous()
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        wide = x.double()
        y = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)
        before, expected = y.clone(), y.double()
        for t in range(tokens):
            s, r = adapters[pick[t]].tolist()
            for i, (low, high) in enumerate(pairwise(offsets)):
                v = a[i, s : s + r] @ wide[t]
                expected[t, low:high] += v @ b[s : s + r, low:high]
        kernels.lora_add_(y, x, pool, _meta(starts, ranks, 1 if tokens <= 128 else tokens, 100))
        assert relative_error(y, expected) < 3e-3
        assert torch.equal(y[ranks == 0], before[ranks == 0])
