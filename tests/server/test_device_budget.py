"""A GPU's memory is planned as a whole, on cards of every usual size, and what does not fit is refused with words."""

from dataclasses import replace

import pytest

from onebase.errors import BaseModelError
from onebase_server.device_budget import LEAST_SPARE_SHARE, Needs, plan_memory
from onebase_server.engine.graph_keys import (
    MAX_LORA_GRAPHS,
    Bucket,
    base_keys,
    buckets_up_to,
    common_keys,
    key_of,
    most_graphs,
)

GB = 1_000_000_000
SEVEN = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
SMOL = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
SEVEN_WEIGHTS, SMOL_WEIGHTS = int(4.9 * GB), int(0.2 * GB)
"""With the CUDA context."""
SERVER = Needs(
    config=SEVEN,
    element_bytes=2,
    max_context=2048,
    max_sequences=64,
    max_step_tokens=1024,
    adapter_slots=16,
    max_lora_rank=64,
    has_graphs=True,
)
SMALLER = replace(SERVER, adapter_slots=4, max_lora_rank=16, max_step_tokens=512, max_sequences=16, max_context=1024)
TOKEN = 2 * 32 * 4096 * 2


def test_a_7b_with_the_default_settings_fits_a_24_gb_card_with_room_for_a_training_job() -> None:
    budget = plan_memory(SERVER, 24 * GB - SEVEN_WEIGHTS)
    assert budget.kv == budget.kv_tokens * TOKEN
    assert budget.kv_tokens > 8000
    assert 5 * GB < budget.slots < 5.5 * GB, "16 slots of rank 64 on seven modules"
    assert budget.left > 4 * GB


@pytest.mark.parametrize("card", [16, 24, 48, 80, 141])
@pytest.mark.parametrize("config", [SEVEN, SMOL], ids=["7B", "135M"])
def test_the_parts_never_exceed_what_is_free(card: int, config: dict[str, int]) -> None:
    free = card * GB - (SEVEN_WEIGHTS if config is SEVEN else SMOL_WEIGHTS)
    budget = plan_memory(replace(SERVER, config=config), free)
    parts = budget.slots + budget.graphs + budget.workspaces + budget.kv
    assert min(budget.slots, budget.graphs, budget.workspaces, budget.kv) > 0
    assert parts + budget.left == free
    assert budget.left >= LEAST_SPARE_SHARE * free
    assert 1024 <= budget.kv_tokens <= 64 * 2048


def test_more_memory_never_gives_fewer_pages() -> None:
    tokens = [plan_memory(SMALLER, free * GB).kv_tokens for free in range(3, 140)]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 16 * 1024, "no more than all sequences could fill"


def test_the_cache_shrinks_to_a_floor_before_anything_is_refused() -> None:
    roomy, tight = (plan_memory(SERVER, int(free * GB)) for free in (16, 9.9))
    assert (roomy.slots, roomy.graphs) == (tight.slots, tight.graphs)
    assert roomy.kv_tokens > tight.kv_tokens == 2048
    assert tight.left < 0.25 * 9.9 * GB, "what was kept for a training job went first"


def test_an_8_gb_card_is_refused_by_the_names_of_the_settings_and_takes_smaller_ones() -> None:
    free = 8 * GB - SEVEN_WEIGHTS
    with pytest.raises(BaseModelError) as caught:
        plan_memory(SERVER, free)
    said = caught.value.message
    assert "3.10 GB free" in said
    for name in ("ADAPTER_SLOTS=16", "MAX_LORA_RANK=64", "MAX_STEP_TOKENS=1024", "MAX_SEQUENCES=64"):
        assert f"ONEBASE_{name}" in said
    assert said.index("ADAPTER_SLOTS") < said.index("MAX_STEP_TOKENS"), "the largest first"
    assert plan_memory(SMALLER, free).kv_tokens >= 1024


def test_a_long_context_is_held_as_far_as_memory_goes() -> None:
    needs = replace(SERVER, max_context=131_072, config={**SEVEN, "num_key_value_heads": 8})
    budget = plan_memory(needs, 24 * GB - SEVEN_WEIGHTS)
    assert 2048 < budget.kv_tokens < 131_072


def test_asked_tokens_are_held_or_refused_by_name() -> None:
    assert plan_memory(replace(SERVER, kv_tokens=20_000), 24 * GB).kv_tokens == 20_000
    with pytest.raises(BaseModelError, match="ONEBASE_KV_TOKENS=40000"):
        plan_memory(replace(SERVER, kv_tokens=40_000), 24 * GB)


def test_without_our_kernels_whole_weights_are_unpacked_and_nothing_is_captured() -> None:
    ours, plain = (plan_memory(replace(SERVER, has_graphs=has), 40 * GB) for has in (True, False))
    assert plain.graphs == 0
    assert plain.workspaces > ours.workspaces


def test_graphs_are_planned_with_room_over_what_they_were_measured_to_take_but_not_several_times_that() -> None:
    measured = 0.19 * GB / 176  # a graph of a 7B on an H200
    planned = plan_memory(SERVER, 80 * GB).graphs / most_graphs(SERVER.max_sequences, SERVER.max_context)
    assert 1.5 * measured < planned < 2.5 * measured


def test_a_long_context_takes_room_for_the_parts_that_attention_splits_it_into() -> None:
    short, long = (plan_memory(replace(SERVER, max_context=n), 80 * GB) for n in (2048, 131_072))
    assert long.workspaces - short.workspaces > 256 * 4096 * 4 * (32 - 4), "256 rows of fp32 sums a split"


def test_every_part_is_told_to_the_operator() -> None:
    budget = plan_memory(SERVER, 24 * GB - SEVEN_WEIGHTS)
    lines = budget.lines(SEVEN_WEIGHTS)
    assert float(lines[0].split()[0]) == 4.9
    text = "\n".join(lines)
    for part in ("weights", f"{budget.kv_tokens} tokens", "adapter slots", "graphs", "workspaces", "left"):
        assert part in text


@pytest.mark.parametrize("max_batch", [1, 7, 64, 128, 4096])
@pytest.mark.parametrize("limit", [256, 2048])
def test_no_more_graphs_are_captured_than_the_plan_counts(max_batch: int, limit: int) -> None:
    buckets = buckets_up_to(max_batch)
    base = base_keys(buckets, limit, (False, True))
    common = common_keys(buckets, limit, (False, True), 64)
    assert len({*base, *common}) == len(base) + len(common) <= most_graphs(max_batch, limit)
    assert len(common) <= MAX_LORA_GRAPHS
    tokens = [key.bucket.tokens for key in base]
    assert tokens == sorted(tokens, reverse=True), "the largest first: its memory serves the others"


def test_the_presets_adapters_meet_graphs_captured_at_the_start() -> None:
    buckets = buckets_up_to(64)
    common = common_keys(buckets, 2048, (False, True), 64)
    for active, rank in ((frozenset({"qkv"}), 8), (frozenset({"qkv", "o", "gate_up", "down"}), 16)):
        for draws in (False, True):
            for bucket in (Bucket(32), Bucket(32, prefill=True)):
                assert key_of(bucket, active, rank, 300, 2048, draws=draws) in common
    assert key_of(Bucket(32), frozenset({"qkv"}), 9, 300, 2048, draws=False) not in common
    assert {key.max_rank for key in common_keys(buckets, 2048, (False,), 8)} == {8}, "no slot holds more"


def test_a_step_without_adapters_meets_a_graph_of_the_base() -> None:
    for context in (1, 512, 513, 2048):
        for bucket in (Bucket(8), Bucket(64, prefill=True)):
            key = key_of(bucket, frozenset(), 0, context, 2048, draws=False)
            assert key in base_keys(buckets_up_to(8), 2048, (False,))
            assert key.max_context >= context
