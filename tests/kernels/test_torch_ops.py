"""The torch twin against float64 and the definitions, and its NF4 values against bitsandbytes' own."""

import math

import pytest
import torch

from nf4_weights import exact, random_weight
from onebase_server.kernels.ops import LoraPool, StepMeta
from onebase_server.kernels.torch_ops import TorchKernels, dequantize

pytestmark = pytest.mark.slow

KERNELS = TorchKernels()
PAGE = 4


def meta(queries: list[int], contexts: list[int], ranks: list[tuple[int, int]] | None = None) -> StepMeta:
    """Sequences with scattered pages; `ranks`: (start, rank) of each sequence's adapter."""
    ranks = ranks or [(0, 0)] * len(queries)
    width = -(-max(contexts) // PAGE)
    tables = torch.randperm(len(queries) * width).view(len(queries), width).int()
    seqs = torch.repeat_interleave(torch.arange(len(queries)), torch.tensor(queries))
    positions = torch.cat([torch.arange(c - q, c) for q, c in zip(queries, contexts, strict=True)])
    pages = tables[seqs, positions // PAGE].long()
    rows = torch.tensor(ranks, dtype=torch.int32)[seqs]
    return StepMeta(
        positions=positions.int(),
        kv_slots=pages * PAGE + positions % PAGE,
        query_starts=torch.tensor([0, *queries]).cumsum(0).int(),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        token_seqs=seqs.int(),
        lora_starts=rows[:, 0].contiguous(),
        lora_ranks=rows[:, 1].contiguous(),
        has_lora=any(rank for _, rank in ranks),
        max_rank=max(rank for _, rank in ranks),
        max_query=max(queries),
        max_context=max(contexts),
    )


def test_dequantised_values_are_bitsandbytes_own_to_the_bit() -> None:
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    from onebase_server.kernels.ops import NF4Weight

    for dtype in (torch.float32, torch.bfloat16):
        original = torch.randn(96, 128, dtype=dtype)
        packed, state = quantize_4bit(original, quant_type="nf4", compress_statistics=True)
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        own = NF4Weight(packed.view(96, 64), absmax.float().view(96, 2), (96, 128), state.code.float())
        assert torch.equal(dequantize(own, dtype), dequantize_4bit(packed, state))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_matmul_is_that_of_the_exact_weight(dtype: torch.dtype, tolerance: float) -> None:
    weight = random_weight(48, 128, "cpu")
    x = torch.randn(7, 128, dtype=dtype)
    expected = x.double() @ exact(weight).T
    assert (KERNELS.nf4_matmul(x, weight) - expected).norm() < tolerance * expected.norm()


def test_lora_adds_each_tokens_own_adapter_and_leaves_bare_rows_bit_for_bit() -> None:
    pool = LoraPool(torch.randn(2, 12, 64), torch.randn(12, 40), (0, 24, 40))
    step = meta([2, 1, 3], [2, 1, 3], [(0, 3), (0, 0), (4, 8)])
    x, y = torch.randn(6, 64), torch.randn(6, 40)
    out = y.clone()
    KERNELS.lora_add_(out, x, pool, step)
    expected = y.double()
    for t in range(6):
        own = slice(int(step.lora_starts[t]), int(step.lora_starts[t] + step.lora_ranks[t]))
        for i, columns in enumerate((slice(0, 24), slice(24, 40))):
            expected[t, columns] += (x[t].double() @ pool.a[i, own].double().T) @ pool.b[own, columns].double()
    assert torch.allclose(out.double(), expected, atol=1e-4)
    assert torch.equal(out[2], y[2])


def test_norms_and_gate_are_their_definitions() -> None:
    x, residual, gain = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    normed, total = KERNELS.add_rms_norm(x, residual, gain, 1e-5)
    wide = (x + residual).double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()
    assert torch.equal(total, x + residual)
    assert torch.allclose(normed.double(), expected, atol=1e-5)
    gate, up = x.double().chunk(2, -1)
    assert torch.allclose(KERNELS.silu_mul(x).double(), gate / (1 + (-gate).exp()) * up, atol=1e-6)


def test_rope_turns_pairs_of_halves_and_pages_hold_what_attention_reads() -> None:
    heads, groups, head = 4, 2, 8
    queries, contexts = [3, 1], [9, 5]
    step = meta(queries, contexts)
    shape = (16, PAGE, groups, head)
    k_cache, v_cache = torch.zeros(shape), torch.zeros(shape)
    angle = torch.rand(16, head // 2) * math.tau
    history = [torch.randn(c, (heads + 2 * groups) * head) for c in contexts]
    for past in range(max(contexts)):  # one token at a time up to the step's own
        for s, tokens in enumerate(history):
            if past < contexts[s] - queries[s]:
                one = meta([1], [past + 1])
                one.kv_slots = step.block_tables[s, past // PAGE].long()[None] * PAGE + past % PAGE
                KERNELS.rope_write_kv(tokens[past][None], angle.cos(), angle.sin(), k_cache, v_cache, one)
    own = torch.cat([tokens[-q:] for tokens, q in zip(history, queries, strict=True)])
    q = KERNELS.rope_write_kv(own, angle.cos(), angle.sin(), k_cache, v_cache, step)
    out = KERNELS.paged_attention(q, k_cache, v_cache, 0.3, step)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones(4).double(), angle[position].double())
        return torch.cat((pairs.real, pairs.imag), -1)

    row = 0
    for tokens, length, count in zip(history, contexts, queries, strict=True):
        parts = tokens.view(length, -1, head).split_with_sizes([heads, groups, groups], 1)
        keys = torch.stack([turned(parts[1][p], p) for p in range(length)])
        for position in range(length - count, length):
            query = turned(parts[0][position], position)
            for h in range(heads):
                scores = keys[: position + 1, h // 2] @ query[h] * 0.3
                expected = scores.softmax(0) @ parts[2][: position + 1, h // 2].double()
                assert torch.allclose(out[row, h * head : (h + 1) * head].double(), expected, atol=1e-5)
            row += 1
