"""`CudaRunner` against `TorchRunner` over the twin kernels: the same steps, whatever changes between replays."""

import random
from dataclasses import replace

import numpy as np
import pytest

from gpu_runners import Sequence, make_batch, make_rows, random_adapter

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def _adapter(runner, rank: int, seed: int):
    """Random weights for some projections, zero rank elsewhere."""
    import torch

    targets = runner.slots.a if seed % 2 else {"qkv"}
    return random_adapter(runner, rank, targets, 0.1, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kept", [128, 2], ids=["all kept", "graphs make way"])
def test_replays_follow_changes_of_batch_pages_and_adapters(runners, kept: int, monkeypatch) -> None:
    import torch

    from onebase.lru import Lru

    ours, reference = runners
    monkeypatch.setattr(ours._graphs, "_lora", Lru(kept))
    rng = random.Random(7)
    free = list(range(600))
    rng.shuffle(free)
    live: list[Sequence] = []
    loaded: dict[int, int] = {}
    for step in range(60):
        if step % 9 == 0:  # another adapter in some slot that nobody uses: rows move together
            idle = [s for s in range(4) if all(q.slot != s for q in live)]
            for slot in idle[:2]:
                rank = rng.choice([1, 8, 16])
                for runner in runners:
                    runner.clear_slot(slot)
                    runner.load_slot(slot, _adapter(runner, rank, step + slot))
                    torch.cuda.synchronize()
                    assert runner.slot_ready(slot)
                loaded[slot] = rank
        if step % 4 == 0 and len(live) < 36:
            for _ in range(rng.randint(1, 9)):
                slot = rng.choice([-1, *loaded])
                live.append(Sequence(len(live), [rng.randrange(768) for _ in range(rng.randint(1, 70))], slot))
        if len(live) > 12 and rng.random() < 0.2:
            for gone in rng.sample(live, rng.randint(1, 9)):
                live.remove(gone)
                free += gone.pages
        batch = make_batch(live, free, top_logprobs=5)
        mine, theirs = ours.run(batch), reference.run(batch)
        for i, row in enumerate(theirs.top_logprobs):
            expected = dict(zip(theirs.top_ids[i].tolist(), row.tolist(), strict=True))
            got = dict(zip(mine.top_ids[i].tolist(), mine.top_logprobs[i].tolist(), strict=True))
            shared = expected.keys() & got.keys()
            assert len(shared) >= 3, (step, expected, got)
            assert max(abs(expected[t] - got[t]) for t in shared) < 0.12, (step, expected, got)
        if ours._bucket(batch) is not None:  # the graph's own greedy choice
            plain = ours.run(replace(batch, rows=make_rows(live)))
            for token, ids, values in zip(plain.token_ids, mine.top_ids, mine.top_logprobs, strict=True):
                assert token in ids[values == values[0]], step  # logits in bf16 tie now and then
        for s, token in zip(live, theirs.token_ids.tolist(), strict=True):
            s.ids.append(token)
    assert len(ours._graphs._lora) == kept or 2 < len(ours._graphs._lora) < kept


@pytest.fixture(params=["fused", "plain"])
def graph_runner(request, runners):
    """The CUDA runner; and with the forward pass of cards before Hopper, which takes less prefill into a graph."""
    import torch

    from onebase_server.engine.cuda_graphs import StepGraphs
    from onebase_server.engine.model_forward import ModelForward
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.kernels.cuda_variants import MAX_TOKENS

    ours, reference = runners
    if request.param == "fused":
        return ours
    kernels, raw = ours.forward.kernels, reference.weights
    layers = [
        replace(one, projections={n: replace(p, weight=kernels.prepare(p.weight)) for n, p in one.projections.items()})
        for one in raw.layers
    ]
    plain = CudaRunner.__new__(CudaRunner)
    plain.__dict__.update(ours.__dict__)
    pools = [ours.slots.layer(i) for i in range(raw.geometry.layers)]
    plain.forward = ModelForward(replace(raw, layers=layers), kernels, ours.cache, pools)
    assert plain._most_prefill(kernels) == MAX_TOKENS
    with torch.inference_mode():
        plain._graphs = StepGraphs(plain.forward, 40, ours._graphs._width, MAX_TOKENS)
    return plain


@pytest.mark.parametrize("tokens", [20, 60, 100, 128, 150, 250])
def test_prefill_in_a_graph_is_prefill_without_one(graph_runner, runners, tokens: int, monkeypatch) -> None:
    """Two prompts, one of them after a cached part, beside sequences that decode, with adapters and without."""
    from onebase_server.engine import runner_cuda

    ours = graph_runner
    for runner in runners:
        for slot, rank in ((0, 8), (1, 16)):
            runner.clear_slot(slot)
            runner.load_slot(slot, _adapter(runner, rank, slot + 1))
    free, half = list(range(600)), tokens // 2
    live = [Sequence(i, [(i * 31 + j) % 768 for j in range(50)], (-1, 0, 1)[i % 3]) for i in range(6)]
    ours.run(make_batch(live, free))
    for s in live[:5]:
        s.ids.append(s.ids[7])
    live[5].ids += [(5 * j) % 768 for j in range(half)]
    live.append(Sequence(6, [(7 * j) % 768 for j in range(tokens - half - 5)], 1))
    batch = make_batch(live, free, top_logprobs=20)
    assert len(batch.token_ids) == tokens
    assert (ours._bucket(batch) is not None) == (tokens <= ours._graphs._buckets[-1].tokens)
    in_graph = ours.run(batch)
    greedy = ours.run(replace(batch, rows=make_rows(live)))
    monkeypatch.setattr(runner_cuda, "MOST_READS", 0)
    assert ours._bucket(batch) is None, "nothing would be compared"
    without = ours.run(batch)
    for i, row in enumerate(without.top_logprobs):
        expected = dict(zip(without.top_ids[i].tolist(), row.tolist(), strict=True))
        got = dict(zip(in_graph.top_ids[i].tolist(), in_graph.top_logprobs[i].tolist(), strict=True))
        shared = expected.keys() & got.keys()
        assert len(shared) >= 15, i
        assert max(abs(expected[t] - got[t]) for t in shared) < 0.08, i
        best = in_graph.top_ids[i][in_graph.top_logprobs[i] == in_graph.top_logprobs[i][0]]
        assert greedy.token_ids[i] in best, i


def test_the_same_step_gives_the_same_bits_whatever_was_replayed_between(runners) -> None:
    ours, _ = runners
    free = list(range(600))
    live = [Sequence(i, [(i * 37 + j) % 768 for j in range(20)], -1) for i in range(6)]
    ours.run(make_batch(live, free))
    for s in live:
        s.ids.append(5)
    batch = make_batch(live, free, top_logprobs=3)
    first = ours.run(batch)
    other = [Sequence(9, [1, 2, 3], -1)]
    ours.run(make_batch(other, free))
    other[0].ids.append(4)
    ours.run(make_batch(other, free))
    again = ours.run(batch)
    for before, after in zip(first.top_logprobs, again.top_logprobs, strict=True):
        assert before.tolist() == after.tolist()


def test_scored_tokens_have_the_reference_runners_logprobs(runners) -> None:
    """A prompt's own logprobs, beside a sequence that decodes; also in a step with one token a sequence."""
    ours, reference = runners
    free = list(range(600))
    live = [Sequence(0, [(j * 29) % 768 for j in range(40)], -1), Sequence(1, [5], -1)]
    batch = make_batch(live, free)
    wide = replace(batch, scored=np.arange(39, dtype=np.int32), score_targets=batch.token_ids[1:40], score_top=3)
    live[0].ids.append(7)
    live[1].ids.append(9)
    narrow = make_batch(live, free)
    narrow = replace(narrow, scored=np.array([1], np.int32), score_targets=np.array([3], np.int32), score_top=1)
    for step in (wide, narrow):
        mine, theirs = ours.run(step), reference.run(step)
        assert mine.scores is not None
        assert theirs.scores is not None
        assert abs(mine.scores.logprobs - theirs.scores.logprobs).max() < 0.12
        assert mine.scores.top_ids.shape == (len(step.scored), step.score_top)
        assert len(mine.token_ids) == 2


def test_steps_of_a_thread_that_never_saw_the_device_run_on_the_runners(runners) -> None:
    """The base is loaded by one thread and served by another, whose current device CUDA knows nothing of."""
    import threading

    import torch

    ours, _ = runners
    seen = []

    def work() -> None:
        live, free = [Sequence(0, [1, 2, 3, 4], -1)], list(range(600))
        for _ in range(4):
            live[0].ids.append(int(ours.run(make_batch(live, free)).token_ids[0]))
        seen.append((torch.cuda.current_device(), live[0].ids))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen[0][0] == ours.device.index
    assert seen[0] == seen[1]
