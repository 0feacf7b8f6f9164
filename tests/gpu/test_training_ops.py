"""Training's operations on CUDA against their twins: Triton against plain torch, unpacking against bitsandbytes,
packed attention against each row alone, and a whole small model against plain PEFT."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

from onebase_training import layer_ops, preflight, triton_lora, triton_ops, triton_unpack
from onebase_training.attention import attend
from onebase_training.batches import collate, token_weights
from onebase_training.fused_ops import RmsNorm, Rotary, SwiGlu
from onebase_training.rows import Row
from training_arms import Shape, ours, plain

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def assert_same(function, *inputs, tolerance):
    """Output and gradients on CUDA are those of the plain expression on the CPU."""
    found = []
    for device in ("cpu", "cuda"):
        own = [x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]
        out = function(*own)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append([out, *torch.autograd.grad(out, [x for x in own if x.requires_grad], grad)])
    for plain_one, cuda_one in zip(*found, strict=True):
        assert cuda_one.dtype == plain_one.dtype
        torch.testing.assert_close(cuda_one.float().cpu(), plain_one.float(), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("width", [64, 100, 576, 4096])
def test_rms_norm_of_a_wide_stream(dtype, tolerance, width):
    x, weight = values(3, 7, width).requires_grad_(), values(width, dtype=dtype)

    assert_same(lambda x, w: RmsNorm.apply(x, w, 1e-5, dtype), x, weight, tolerance=tolerance)


@DTYPES
@pytest.mark.parametrize("count", [1, 1000, 11008])
def test_swiglu(dtype, tolerance, count):
    gate, up = (values(5, count, dtype=dtype).requires_grad_() for _ in range(2))

    assert_same(SwiGlu.apply, gate, up, tolerance=tolerance)


@DTYPES
@pytest.mark.parametrize(("heads", "size"), [(3, 16), (9, 64), (32, 128)])
def test_rotary(dtype, tolerance, heads, size):
    x = values(2, 11, heads, size, dtype=dtype).requires_grad_()
    angles = values(1, 11, size // 2).repeat(1, 1, 2)

    assert_same(Rotary.apply, x, angles.cos().to(dtype), angles.sin().to(dtype), tolerance=tolerance)


def test_rotary_of_a_view_with_strides():
    x = values(2, 3, 5, 16).cuda().transpose(1, 2)
    angles = values(2, 5, 8).repeat(1, 1, 2).cuda()

    out = triton_ops.rotate(x, angles.cos(), angles.sin(), 1.0)

    torch.testing.assert_close(out, triton_ops.rotate(x.contiguous(), angles.cos(), angles.sin(), 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (4096, 11008)])
def test_unpacked_weights_are_bitsandbytes_values_to_the_bit(shape, nested, dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(*shape, device="cuda", dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)

    assert torch.equal(triton_unpack.unpack(packed, state, dtype), dequantize_4bit(packed, state))


@pytest.mark.parametrize(("n", "k", "folds"), [(64, 64, False), (192, 320, False), (96, 192, False), (256, 4096, True)])
def test_a_servers_tiles_are_unpacked_to_the_values_of_the_plain_way(n, k, folds, monkeypatch):
    from bitsandbytes.functional import quantize_4bit

    from onebase_server.kernels.cuda_tiles import CODE_SCALE, fold, repack
    from onebase_server.kernels.ops import NF4Weight
    from onebase_training import unpacking

    packed, state = quantize_4bit(torch.randn(n, k, device="cuda").bfloat16(), quant_type="nf4", blocksize=64)
    weight = NF4Weight(packed.view(n, k // 2), state.absmax.view(n, k // 64), (n, k), state.code)
    tiles = fold(repack(weight), n) if folds else repack(weight)
    parts = [(0, n // 2, 0), (n // 2, n // 2, 1)] if folds else [(0, n, None), (n // 2, n - n // 2, None)]
    for first, rows, turn in parts:
        source = unpacking.TiledRows(tiles.data, state.code, CODE_SCALE, first, (rows, k), turn)
        values = source(torch.bfloat16)
        with monkeypatch.context() as plain:
            plain.setattr(unpacking, "triton_unpack_for", lambda *_: None)
            assert torch.equal(values, source(torch.bfloat16))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    ("modules", "rank", "width", "tokens"), [(3, 16, 4096, 300), (2, 64, 576, 33), (1, 128, 1536, 2500)]
)
@pytest.mark.parametrize("has_gain", [True, False])
def test_lora_there_and_back(dtype, tolerance, modules, rank, width, tokens, has_gain):
    x, a = values(tokens, width, dtype=dtype), values(modules, rank, width, dtype=dtype)
    gain = values(width, dtype=dtype) if has_gain else None
    grad_low, grad_x = values(tokens, modules * rank, dtype=dtype), values(tokens, width, dtype=dtype)
    scales = [0.5, 2.0, 1.0][:modules]
    found = []
    for device in ("cpu", "cuda"):
        kind = torch.float64 if device == "cpu" else dtype
        own_x, own_a, own_low, own_grad = (t.to(device, kind) for t in (x, a, grad_low, grad_x.clone()))
        own_gain = None if gain is None else gain.to(device, kind)
        low = layer_ops.shrink(own_x, own_a, scales, 0.0, 0)
        grad_a = layer_ops.shrink_back(own_grad, own_x, own_gain, own_low, own_a, scales, 0.0, 0)
        found.append([t.double().cpu() for t in (low, grad_a, own_grad)])
    for exact, ours_ in zip(*found, strict=True):
        assert (exact - ours_).norm() < tolerance * exact.norm()


def test_lora_drops_the_same_values_there_and_back_and_others_for_each_module_and_seed():
    x, a, grad = values(70, 192).cuda(), values(3, 16, 192).cuda(), values(70, 48).cuda()
    scales = [1.0, 0.5, 2.0]

    there = (triton_lora.shrink(x, a, scales, 0.25, 7) * grad).sum()
    grad_x = torch.zeros_like(x)
    grad_a = triton_lora.back(grad_x, x, None, grad, a, scales, 0.25, 7)

    torch.testing.assert_close((grad_x * x).sum(), there, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close((grad_a * a.flatten(0, 1)).sum(), there, rtol=1e-4, atol=1e-2)
    ones, picks = torch.ones(4000, 64).cuda(), torch.eye(64)[:16].repeat(3, 1, 1).contiguous().cuda()
    kept = triton_lora.shrink(ones, picks, [1.0] * 3, 0.25, 9).view(4000, 3, 16).bool()
    assert abs(kept.float().mean().item() - 0.75) < 0.01
    for other in (
        kept[:, 1],
        kept[:, 2],
        triton_lora.shrink(ones, picks, [1.0] * 3, 0.25, 10).view_as(kept)[:, 0].bool(),
    ):
        assert abs((kept[:, 0] != other).float().mean().item() - 2 * 0.75 * 0.25) < 0.02


def test_a_layer_that_computes_again_drops_what_it_dropped():
    arm = ours(SMALL, torch.device("cuda"), {**LORA, "dropout": 0.2}, dtype=torch.float32, b_std=0.05)
    micro = collate(rows(), token_weights(rows(), "tokens"), packing=True, pad_id=0).to(torch.device("cuda"))
    found = []
    for kept in (0, 3):
        arm.objective.recompute.keep(kept)
        arm.model.zero_grad()
        torch.manual_seed(3)
        arm.objective(micro).loss.backward()
        found.append([p.grad.clone() for _, p in arm.named])
    for again, kept_one in zip(*found, strict=True):
        torch.testing.assert_close(again, kept_one)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 128), (9, 3, 64)])
def test_packed_attention_is_attention_of_each_row_alone(heads, kv_heads, size):
    borders = (0, 130, 131, 400)
    q, k, v = (values(1, 400, n, size).cuda().requires_grad_() for n in (heads, kv_heads, kv_heads))

    def alone(a, b):
        rows = (x[:, a:b].transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)

    expected = torch.cat([alone(a, b) for a, b in pairwise(borders)], dim=1)
    narrow = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    out = attend(*narrow, size**-0.5, borders)
    grad = torch.randn_like(expected)

    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    for got, want in zip(
        torch.autograd.grad(out, narrow, grad.bfloat16()), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        assert (got.float() - want).norm() < 0.02 * want.norm()


def rows():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 512, (n,), generator=generator).int().numpy() for n in (70, 130, 9)]
    return [Row(ids, torch.arange(len(ids)).gt(0).numpy()) for ids in made]


SMALL = Shape(hidden=256, inner=512, layers=3, heads=4, kv_heads=2, vocab=512)
LORA = {"r": 8, "alpha": 16, "target_modules": "all-linear"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's own
@pytest.mark.parametrize("kept", [0, 2, 3])
def test_a_model_has_plain_pefts_loss_and_gradients(kept):
    device = torch.device("cuda")
    theirs = plain(SMALL, device, LORA, dtype=torch.float32, b_std=0.05)
    arm = ours(SMALL, device, LORA, dtype=torch.float32, b_std=0.05)
    arm.objective.recompute.keep(kept)
    made = rows()
    ids = torch.zeros(3, 130, dtype=torch.int64, device=device)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(made):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.from_numpy(row.ids)
    expected = theirs.model(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss
    expected.backward()

    found = arm.objective(collate(made, token_weights(made, "tokens"), packing=True, pad_id=0).to(device)).loss
    found.backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    by_name = {name.removeprefix("model."): p.grad for name, p in theirs.named}
    for name, p in arm.named:
        assert (p.grad - by_name[name.removeprefix("model.")]).norm() < 1e-3 * p.grad.norm()


def test_preflight_keeps_the_layers_that_fit_and_stays_below_the_limit():
    """Three layers whose activations weigh: with room all keep, with room for one not more than that one."""
    shape = Shape(hidden=512, inner=2048, layers=3, heads=8, kv_heads=8, vocab=512)
    arm = ours(shape, torch.device("cuda"), LORA)
    batch = collate(
        [Row(torch.randint(3, 512, (4096,)).int().numpy(), torch.ones(4096).bool().numpy())],
        [1 / 4096],
        packing=True,
        pad_id=0,
    ).to(torch.device("cuda"))
    recompute = arm.objective.recompute
    recompute.keep(0)
    preflight._step(arm.objective, batch)  # what is compiled and cached at first use
    peak = preflight._step(arm.objective, batch)
    per_layer = preflight._standing(arm.objective, recompute, batch, 1) - preflight._standing(
        arm.objective, recompute, batch, 0
    )

    for limit, most in ((peak + 1.5 * per_layer, 1), (1e12, 3)):
        recompute.limit_gb = limit / 1e9
        preflight._keep_what_fits(arm.objective, recompute, batch, peak)
        assert recompute.kept == most
        assert preflight._step(arm.objective, batch) <= limit
