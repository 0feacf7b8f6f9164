"""Norms, RoPE + KV write, SwiGLU and attention on CUDA against the plain torch twin in fp32."""

from dataclasses import replace

import pytest

from nf4_weights import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def _step(lengths: list[int], queries: list[int], page: int, pages: int, pad: int = 3):
    """Sequences with `queries[s]` new tokens at the end of `lengths[s]`, on randomly placed pages."""
    import torch

    from onebase_server.kernels.ops import StepMeta

    width = max(-(-n // page) for n in lengths) + pad
    order = torch.randperm(pages).int()
    table, at = torch.zeros(len(lengths), width, dtype=torch.int32), 0
    positions, slots, seqs = [], [], []
    for s, (length, query) in enumerate(zip(lengths, queries, strict=True)):
        count = -(-length // page)
        table[s, :count] = order[at : at + count]
        at += count
        for p in range(length - query, length):
            positions.append(p)
            slots.append(int(table[s, p // page]) * page + p % page)
            seqs.append(s)
    starts = [0]
    for q in queries:
        starts.append(starts[-1] + q)

    def put(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device="cuda")

    empty = put([0] * len(seqs))
    return StepMeta(
        put(positions), put(slots, torch.int64), put(starts), put(lengths), table.cuda(), put(seqs), empty, empty,
        False, 0, max(queries), max(lengths),
    )  # fmt: skip


@pytest.mark.parametrize("k", [64, 576, 4096, 11008])
def test_norms_equal_the_twin(kernels, k: int) -> None:
    import torch

    from onebase_server.kernels.torch_ops import TorchKernels

    x, r = (torch.randn(5, k, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gain = torch.randn(k, device="cuda", dtype=torch.bfloat16)
    twin = TorchKernels()
    assert relative_error(kernels.rms_norm(x, gain, 1e-5), twin.rms_norm(x, gain, 1e-5).double()) < 2e-3
    out, total = kernels.add_rms_norm(x, r, gain, 1e-5)
    expected, expected_total = twin.add_rms_norm(x, r, gain, 1e-5)
    assert torch.equal(total, expected_total)
    assert relative_error(out, expected.double()) < 2e-3


def test_silu_mul_equals_fp64(kernels) -> None:
    import torch

    x = torch.randn(7, 2 * 11008, device="cuda", dtype=torch.bfloat16) * 3
    gate, up = x.double().chunk(2, -1)
    assert relative_error(kernels.silu_mul(x), torch.nn.functional.silu(gate) * up) < 3e-3


@pytest.mark.parametrize(("heads", "groups", "head"), [(32, 32, 128), (9, 3, 64), (8, 1, 128), (4, 2, 256)])
@pytest.mark.parametrize("page", [16, 32])
def test_decode_attention_equals_the_twin(kernels, heads: int, groups: int, head: int, page: int) -> None:
    import torch

    from onebase_server.kernels.torch_ops import TorchKernels

    for lengths in ([1], [257], [2000], [1, 2, 31, 32, 33, 700], list(range(1, 130)), [513] * 40 + [1500]):
        pages = sum(-(-n // page) for n in lengths) + 5
        caches = [torch.full((pages, page, groups, head), float("nan"), device="cuda").bfloat16() for _ in range(2)]
        meta = _step(lengths, [1] * len(lengths), page, pages)
        _fill(caches, meta, lengths, page)
        q = torch.randn(len(lengths), heads, head, device="cuda", dtype=torch.bfloat16)
        out = kernels.paged_attention(q, *caches, head**-0.5, meta)
        again = kernels.paged_attention(q, *caches, head**-0.5, meta)
        expected = TorchKernels().paged_attention(q.float(), *(c.float() for c in caches), head**-0.5, meta)
        assert relative_error(out, expected.double()) < 4e-3, lengths
        assert torch.equal(out, again)


@pytest.mark.parametrize(("heads", "groups", "head"), [(32, 32, 128), (9, 3, 64), (8, 1, 128), (4, 2, 256)])
def test_the_fused_decode_step_equals_its_parts(kernels, heads: int, groups: int, head: int) -> None:
    import torch

    from onebase_server.kernels.torch_ops import TorchKernels

    page, twin, width = 16, TorchKernels(), (heads + 2 * groups) * head
    angle = torch.rand(2100, head // 2, device="cuda") * 6
    tables = angle.cos(), angle.sin()
    for lengths in ([1], [2000], [1, 2, 31, 32, 33, 64, 65, 700], list(range(1, 70)), [513] * 40 + [1500]):
        pages = sum(-(-n // page) for n in lengths) + 5
        caches = [torch.full((pages, page, groups, head), float("nan"), device="cuda").bfloat16() for _ in range(2)]
        meta = _step(lengths, [1] * len(lengths), page, pages)
        _fill(caches, meta, [n - 1 for n in lengths], page)
        qkv = torch.randn(len(lengths), width, device="cuda", dtype=torch.bfloat16)
        mine = [c.clone() for c in caches]
        out = kernels.decode_attention(qkv, tables, tuple(mine), head**-0.5, meta)
        again = kernels.decode_attention(qkv, tables, tuple(mine), head**-0.5, meta)
        q = twin.rope_write_kv(qkv, *tables, *caches, meta)
        expected = twin.paged_attention(q.float(), *(c.float() for c in caches), head**-0.5, meta)
        assert relative_error(out, expected.double()) < 5e-3, lengths
        assert torch.equal(out, again)
        for ours, theirs in zip(mine, caches, strict=True):
            assert relative_error(ours.nan_to_num(7.0), theirs.nan_to_num(7.0).double()) < 2e-3


@pytest.mark.parametrize(("heads", "groups", "head"), [(32, 32, 128), (9, 3, 64)])
def test_prefill_attention_equals_the_twin(kernels, heads: int, groups: int, head: int) -> None:
    import torch

    from onebase_server.kernels.torch_ops import TorchKernels

    page = 16
    lengths, queries = [5, 300, 77, 40, 129], [5, 100, 1, 40, 128]
    pages = sum(-(-n // page) for n in lengths) + 5
    caches = [torch.full((pages, page, groups, head), float("nan"), device="cuda").bfloat16() for _ in range(2)]
    meta = _step(lengths, queries, page, pages)
    _fill(caches, meta, lengths, page)
    q = torch.randn(sum(queries), heads, head, device="cuda", dtype=torch.bfloat16)
    out = kernels.paged_attention(q, *caches, head**-0.5, meta)
    expected = TorchKernels().paged_attention(q.float(), *(c.float() for c in caches), head**-0.5, meta)
    assert relative_error(out, expected.double()) < 6e-3


@pytest.mark.parametrize(("heads", "groups", "head"), [(32, 32, 128), (9, 3, 64), (8, 1, 128), (4, 2, 256)])
def test_a_flat_steps_attention_equals_the_twin_of_the_same_sequences(
    kernels, heads: int, groups: int, head: int
) -> None:
    """Prompts beside decoding sequences, each token a row of its own; padding rows have no context."""
    import torch

    from onebase_server.kernels.torch_ops import TorchKernels

    page, twin, width = 16, TorchKernels(), (heads + 2 * groups) * head
    angle = torch.rand(2100, head // 2, device="cuda") * 6
    tables = angle.cos(), angle.sin()
    for lengths, queries in (([5], [5]), ([1900, 40], [30, 1]), ([5, 300, 77, 40, 129], [5, 100, 1, 40, 90])):
        pages, tokens = sum(-(-n // page) for n in lengths) + 5, sum(queries)
        caches = [torch.full((pages, page, groups, head), float("nan"), device="cuda").bfloat16() for _ in range(2)]
        meta = _step(lengths, queries, page, pages)
        _fill(caches, meta, [n - q for n, q in zip(lengths, queries, strict=True)], page)
        qkv = torch.randn(tokens + 3, width, device="cuda", dtype=torch.bfloat16)
        mine = [c.clone() for c in caches]
        out = kernels.decode_attention(qkv, tables, tuple(mine), head**-0.5, _flat(meta, padding=3))[:tokens]
        q = twin.rope_write_kv(qkv[:tokens], *tables, *caches, meta)
        expected = twin.paged_attention(q.float(), *(c.float() for c in caches), head**-0.5, meta)
        assert relative_error(out, expected.double()) < 5e-3, lengths
        for ours, theirs in zip(mine, caches, strict=True):
            assert relative_error(ours.nan_to_num(7.0), theirs.nan_to_num(7.0).double()) < 2e-3


def _flat(meta, padding: int):
    """The same step with a row a token."""
    import torch
    from torch.nn.functional import pad

    empty = pad(meta.lora_starts, (0, padding))
    return replace(
        meta,
        positions=pad(meta.positions, (0, padding)),
        kv_slots=pad(meta.kv_slots, (0, padding), value=-1),
        query_starts=torch.arange(len(empty) + 1, device="cuda").int(),
        context_lens=pad(meta.positions + 1, (0, padding)),
        token_seqs=pad(meta.token_seqs, (0, padding)),
        lora_starts=empty,
        lora_ranks=empty,
        max_query=1,
        is_flat=True,
    )


@pytest.mark.parametrize(("heads", "groups", "head"), [(32, 32, 128), (9, 3, 64)])
def test_rope_and_kv_write_equal_the_twin(kernels, heads: int, groups: int, head: int) -> None:
    import torch

    from onebase_server.kernels.torch_ops import TorchKernels

    meta = _step([5, 300, 77], [5, 100, 1], 16, 60)
    qkv = torch.randn(106, (heads + 2 * groups) * head, device="cuda", dtype=torch.bfloat16)
    angle = torch.rand(512, head // 2, device="cuda") * 6
    results = []
    for backend in (kernels, TorchKernels()):
        caches = [torch.full((60, 16, groups, head), 7.0, device="cuda").bfloat16() for _ in range(2)]
        q = backend.rope_write_kv(qkv, angle.cos(), angle.sin(), *caches, meta)
        results.append([q, *caches])
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs.double()) < 2e-3


def _fill(caches, meta, lengths: list[int], page: int) -> None:
    """Random values where a sequence has tokens; everything else stays NaN."""
    import torch

    for cache in caches:
        for s, length in enumerate(lengths):
            for p in range(-(-length // page)):
                used = min(page, length - p * page)
                block = cache[int(meta.block_tables[s, p])]
                block[:used] = torch.randn(block[:used].shape, device="cuda").bfloat16()
