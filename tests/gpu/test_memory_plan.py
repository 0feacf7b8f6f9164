"""What a runner takes stays inside its plan (server/onebase_server/device_budget.py), also in its heaviest steps."""

from dataclasses import replace

import numpy as np
import pytest

from gpu_runners import Sequence, make_batch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LAYERS = 4


def test_the_heaviest_steps_of_a_7bs_layers_stay_inside_the_plan(kernels) -> None:
    import torch

    from cuda_models import random_model
    from onebase_server.device_budget import Needs, plan_memory
    from onebase_server.engine.runner_cuda import CudaRunner
    from onebase_server.engine.runner_torch import RunnerConfig
    from onebase_server.engine.weights import Geometry

    g = Geometry(LAYERS, 4096, 32, 32, 128, 11008, 32000, 1e-6, 2048)
    needs = Needs(
        config={
            "num_hidden_layers": g.layers,
            "num_attention_heads": g.heads,
            "hidden_size": g.hidden,
            "intermediate_size": g.inner,
            "vocab_size": g.vocab,
        },
        element_bytes=2,
        max_context=g.max_context,
        max_sequences=64,
        max_step_tokens=1024,
        adapter_slots=16,
        max_lora_rank=64,
        has_graphs=True,
        kv_tokens=16_384,
    )
    config = RunnerConfig(
        num_pages=16_384 // 16,
        num_slots=needs.adapter_slots,
        max_lora_rank=needs.max_lora_rank,
        max_batch_tokens=needs.max_step_tokens,
        max_batch_sequences=needs.max_sequences,
        pinned_bytes=1 << 20,
    )
    with torch.no_grad():
        weights = random_model(g, kernels)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    plan = plan_memory(needs, free)

    def taken() -> int:
        return free - torch.cuda.mem_get_info()[0]

    runner = CudaRunner(weights, kernels, config, eos_token_ids=frozenset())
    assert runner.slots.nbytes == plan.slots
    assert 2 * runner.cache.k.nbytes == plan.kv
    assert runner.graph_bytes <= plan.graphs + plan.workspaces
    assert taken() <= plan.slots + plan.kv + plan.graphs + plan.workspaces

    pages, live = list(range(config.num_pages)), []
    for step in range(12):  # 48 sequences of 256 tokens: most of the cache, and the last step gathers all of that
        live += [Sequence(4 * step + i, [(step * i + j) % 32000 for j in range(256)], -1) for i in range(4)]
        batch = make_batch(live[-4:], pages, temperature=0.9, top_p=0.5)
        if step % 5 == 0:
            every = np.arange(1024, dtype=np.int32)
            batch = replace(batch, scored=every, score_targets=batch.token_ids, score_top=5)
        for s, token in zip(live[-4:], runner.run(batch).token_ids.tolist(), strict=True):
            s.ids.append(token)
    live[0].ids += [7] * 900
    runner.run(make_batch(live, pages, temperature=0.9, top_p=0.5))
    torch.cuda.synchronize()
    assert taken() <= plan.slots + plan.kv + plan.graphs + plan.workspaces, plan
