"""NF4 matmul on CUDA against fp64 over a grid of sizes, with poisoned outputs."""

import pytest

from nf4_weights import exact, random_weight, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SHAPES = [
    (24, 64),
    (16, 128),
    (960, 576),
    (576, 1536),
    (3072, 576),
    (4096, 4096),
    (520, 4096),
    (1000, 11008),
    (22016, 4096),
]
TOKENS = (1, 2, 3, 5, 8, 9, 15, 17, 31, 32, 33, 50, 64, 65, 100, 127, 128)


@pytest.fixture(scope="module")
def every_variant(_device: None):
    from onebase_server.kernels.cuda_nf4 import NF4Matmul
    from onebase_server.kernels.cuda_variants import WIDE

    return NF4Matmul(extra=WIDE)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_variant_equals_fp64_and_itself(kernels, every_variant, n: int, k: int) -> None:
    import torch

    weight = random_weight(n, k)
    reference_weight = exact(weight)
    prepared = kernels.prepare(weight)
    nf4, blocks = every_variant, prepared.repacked.blocks
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        reference = x.double() @ reference_weight.T
        for name in nf4.variants:
            if not nf4.fits(name, m, blocks):
                continue
            outputs = []
            for _ in range(2):
                out = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
                outputs.append(nf4.run(name, x, prepared, out))
            assert relative_error(outputs[0], reference) < 3e-3, (name, m)
            assert torch.equal(outputs[0], outputs[1]), (name, m)


def test_rows_of_a_wider_tensor_are_read_in_place(kernels) -> None:
    import torch

    weight = random_weight(256, 512)
    x = torch.randn(40, 1024, device="cuda", dtype=torch.bfloat16)[:, 512:]
    out = kernels.nf4_matmul(x, kernels.prepare(weight))
    assert relative_error(out, x.double() @ exact(weight).T) < 3e-3


@pytest.mark.parametrize("m", [129, 200, 256, 300, 2048])
def test_many_tokens_go_through_the_dequantised_weight(kernels, m: int) -> None:
    import torch

    weight = random_weight(960, 576)
    dense = kernels.nf4.dequantise(
        kernels.prepare(weight), torch.full((960, 576), float("nan"), device="cuda").bfloat16()
    )
    assert relative_error(dense, exact(weight)) < 2e-3
    x = torch.randn(m, 576, device="cuda", dtype=torch.bfloat16)
    out = kernels.nf4_matmul(x, kernels.prepare(weight))
    assert relative_error(out, x.double() @ exact(weight).T) < 4e-3
    if m <= 256:
        halves = kernels.nf4.in_halves(x, kernels.prepare(weight))
        assert relative_error(halves, x.double() @ exact(weight).T) < 4e-3


def test_a_chain_of_overlapping_launches_reads_finished_inputs(kernels) -> None:
    """Each launch may start before the one ahead of it has ended: many small ones, no sync between."""
    import torch

    weights = [random_weight(1024, 1024) for _ in range(6)]
    prepared = [kernels.prepare(w) for w in weights]
    gain = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    for m in (1, 8, 20, 64, 128):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        for synchronise in (True, False):
            out = x
            for _ in range(4):
                for w in prepared:
                    out = kernels.rms_norm(kernels.nf4_matmul(out, w), gain, 1e-6)
                    if synchronise:
                        torch.cuda.synchronize()
            if synchronise:
                expected = out
        assert torch.equal(out, expected), m


@pytest.mark.parametrize("m", [1, 3, 8, 9, 40, 64, 96, 128, 200])
@pytest.mark.parametrize("inner", [64, 1536, 11008])
def test_swiglu_in_the_epilogue_equals_fp64(kernels, m: int, inner: int) -> None:
    import torch

    from onebase_server.kernels.cuda_tiles import fold

    weight = random_weight(2 * inner, 576)
    x = torch.randn(m, 576, device="cuda", dtype=torch.bfloat16)
    gate, up = (x.double() @ exact(weight).T).chunk(2, -1)
    prepared = kernels.prepare(weight)
    prepared.repacked = fold(prepared.repacked, 2 * inner)
    out = kernels.swiglu_matmul(x, prepared)
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < 5e-3


@pytest.mark.parametrize("m", [1])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_inside_the_matmul_equals_its_parts(kernels, m: int, with_residual: bool) -> None:
    import torch

    weight = kernels.prepare(random_weight(1000, 4096))
    x, r = (torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gain = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    out, total, normed = kernels.norm_matmul(x, r if with_residual else None, gain, 1e-6, weight)
    expected_normed, expected_total = kernels.add_rms_norm(x, r if with_residual else torch.zeros_like(r), gain, 1e-6)
    assert torch.equal(total, expected_total)
    assert relative_error(normed, expected_normed.double()) < 2e-3
    assert relative_error(out, kernels.nf4_matmul(expected_normed, weight).double()) < 3e-3
