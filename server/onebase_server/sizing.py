"""How much KV cache to hold on a CPU: plain arithmetic over a base's config and the memory that is free. A GPU's memory
is given out as a whole: see device_budget.py."""

from collections.abc import Mapping
from typing import Any

CPU_SHARE = 0.25
"""Of the free memory: the rest of the machine lives in it too."""
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
    max_context: int,
    max_sequences: int,
) -> int:
    """Tokens of KV cache: a share of the free memory, no more than all sequences could fill, one context at least."""
    budget = min(free_bytes * CPU_SHARE, CPU_LIMIT_BYTES)
    affordable = int(budget) // kv_bytes_per_token(config, element_bytes)
    useful = max_context * max_sequences
    return max(max_context, min(affordable, useful))


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)
