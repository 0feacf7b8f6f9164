"""How much KV cache to hold: plain arithmetic over a base's config and the memory that is free."""

from collections.abc import Mapping
from typing import Any

CPU_SHARE, CUDA_SHARE = 0.25, 0.75
"""Of the free memory. On a CPU the rest of the machine lives in it too; on CUDA the graphs and workspaces (some 9 GB at
7B) and a training job beside (some 4 GB)."""
CPU_LIMIT_BYTES = 1 << 30
PAGE_SIZE = 16


def kv_bytes_per_token(config: Mapping[str, Any], element_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return 2 * int(config["num_hidden_layers"]) * kv_heads * head * element_bytes


def choose_kv_tokens(
    config: Mapping[str, Any],
    *,
    element_bytes: int,
    free_bytes: int,
    on_cuda: bool,
    max_context: int,
    max_sequences: int,
) -> int:
    """Tokens of KV cache: a share of the free memory, no more than all sequences could fill, one context at least."""
    budget = free_bytes * (CUDA_SHARE if on_cuda else CPU_SHARE)
    if not on_cuda:
        budget = min(budget, CPU_LIMIT_BYTES)
    affordable = int(budget) // kv_bytes_per_token(config, element_bytes)
    useful = max_context * max_sequences
    return max(max_context, min(affordable, useful))


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)
