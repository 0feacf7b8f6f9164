"""A GPU's memory, given out as a whole before anything is allocated: slots, graphs, workspaces, then KV pages.

Plain arithmetic over a base's config.json and the server's sizes, so that running out is a sentence at the start and
never a surprise at an admission. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onebase.errors import BaseModelError
from onebase_server.engine.graph_keys import PREFILLS, most_graphs
from onebase_server.sizing import kv_bytes_per_token

SPARE_SHARE, SPARE_BYTES = 0.25, 6_000_000_000
"""Left free: this share, no more than these bytes. A training job beside takes some 4 GB of it (7B)."""
LEAST_SPARE_SHARE = 0.05
"""What stays free in any case, for the allocator's gaps; below it the server does not start."""
KV_FLOOR_TOKENS = 2048
"""Fewer tokens of KV cache (or one whole context, if that is shorter) are of no use."""
_GRAPH_BYTES_PER_LAYER = 64 << 10  # on an H200, 176 graphs of 32 layers took 34 KB each of these
_FIXED_BYTES = 384 << 20  # cuBLAS, kernels' code and split-K sums, an adapter's file on its way
_SAMPLED_BYTES, _SCORED_BYTES = 64, 12  # a logit, drawn from in fp64 and sorted; one whose logprob is asked


@dataclass(frozen=True, slots=True)
class Needs:
    """What a server is to hold; sizes as in its settings."""

    config: Mapping[str, Any]
    """The base's config.json."""
    element_bytes: int
    max_context: int
    max_sequences: int
    max_step_tokens: int
    adapter_slots: int
    max_lora_rank: int
    has_graphs: bool
    """Our kernels compute; else plain torch, which unpacks whole weights."""
    kv_tokens: int | None = None
    """None: as many as there is room for."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes. `free` is what there was beside the weights."""

    free: int
    slots: int
    graphs: int
    workspaces: int
    kv_tokens: int
    kv: int

    @property
    def left(self) -> int:
        return self.free - self.slots - self.graphs - self.workspaces - self.kv

    def lines(self, weights: int) -> list[str]:
        """For the operator. `weights`: bytes that the base takes already."""
        parts = {
            "weights": weights,
            f"KV pages, {self.kv_tokens} tokens": self.kv,
            "adapter slots": self.slots,
            "graphs, at most": self.graphs,
            "workspaces, at most": self.workspaces,
            "left for a training job and gaps": self.left,
        }
        return [f"{value / 1e9:7.2f} GB  {name}" for name, value in parts.items()]


def plan_memory(needs: Needs, free: int) -> Budget:
    """`free`: bytes of the device beside the weights. KV pages take what is left; they shrink to a floor first, then
    what is kept spare does. Raises BaseModelError that names the settings when even that does not fit."""
    slots, graphs, workspaces = _slot_bytes(needs), _graph_bytes(needs), _workspace_bytes(needs)
    token = _bytes_per_token(needs)
    floor = needs.kv_tokens or min(needs.max_context, KV_FLOOR_TOKENS)
    rest = free - slots - graphs - workspaces
    tokens = (rest - int(min(SPARE_SHARE * free, SPARE_BYTES))) // sum(token)
    tokens = needs.kv_tokens or max(floor, min(tokens, needs.max_context * needs.max_sequences))
    if rest - tokens * sum(token) < LEAST_SPARE_SHARE * free:
        needed = slots + graphs + workspaces + floor * sum(token)
        raise BaseModelError(_refusal(needs, free, needed, floor), param="adapter_slots")
    kv, gathered = (each * tokens for each in token)
    return Budget(free, slots, graphs, workspaces + gathered, tokens, kv)


def _refusal(needs: Needs, free: int, needed: int, tokens: int) -> str:
    sizes = {
        f"adapter slots {_gb(_slot_bytes(needs))} (ONEBASE_ADAPTER_SLOTS={needs.adapter_slots} times "
        f"ONEBASE_MAX_LORA_RANK={needs.max_lora_rank})": _slot_bytes(needs),
        f"workspaces {_gb(_workspace_bytes(needs))} (ONEBASE_MAX_STEP_TOKENS={needs.max_step_tokens}, "
        f"ONEBASE_MAX_SEQUENCES={needs.max_sequences})": _workspace_bytes(needs),
        f"KV pages {_gb(tokens * sum(_bytes_per_token(needs)))} ("
        + (
            f"ONEBASE_KV_TOKENS={needs.kv_tokens}"
            if needs.kv_tokens
            else f"{tokens} tokens at least, if ONEBASE_KV_TOKENS does not say fewer"
        )
        + ")": tokens * sum(_bytes_per_token(needs)),
        f"graphs {_gb(_graph_bytes(needs))}": _graph_bytes(needs),
    }
    shown = ", ".join(sorted(sizes, key=lambda text: -sizes[text]))
    return (
        f"beside the weights the device has {_gb(free)} free, and {_gb(needed)} and {LEAST_SPARE_SHARE:.0%} to spare "
        f"are needed: {shown}. Lower what is named here, the largest first, or end what else is on the device"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


@dataclass(frozen=True, slots=True)
class _Sizes:
    layers: int
    hidden: int
    inner: int
    heads: int
    """Query heads, times their size."""
    qkv: int
    vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Sizes":
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        head = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            inner=int(config["intermediate_size"]),
            heads=heads * head,
            qkv=(heads + 2 * kv_heads) * head,
            vocab=int(config["vocab_size"]),
        )


def _row_bytes(needs: Needs) -> int:
    """One rank row of all pools: the modules' inputs on one side, outputs on the other (see lora_slots.py)."""
    s = _Sizes.of(needs.config)
    inputs = 3 * s.hidden + s.heads + 2 * s.hidden + s.inner
    outputs = s.qkv + s.hidden + 2 * s.inner + s.hidden
    return s.layers * (inputs + outputs) * needs.element_bytes


def _slot_bytes(needs: Needs) -> int:
    return needs.adapter_slots * needs.max_lora_rank * _row_bytes(needs)


def _graph_bytes(needs: Needs) -> int:
    if not needs.has_graphs:
        return 0
    s = _Sizes.of(needs.config)
    return most_graphs(needs.max_sequences, needs.max_context) * s.layers * _GRAPH_BYTES_PER_LAYER


def _workspace_bytes(needs: Needs) -> int:
    """All that steps and loads allocate for a while, but for what grows with the KV cache."""
    s, step = _Sizes.of(needs.config), max(needs.max_step_tokens, needs.max_sequences)
    captured = PREFILLS[-1] if needs.has_graphs else 0  # graphs have activations and logits of their own
    activations = (step + captured) * (4 * s.inner + 8 * s.hidden + 2 * s.qkv) * needs.element_bytes
    logits = s.vocab * (needs.max_sequences * _SAMPLED_BYTES + step * _SCORED_BYTES + captured * needs.element_bytes)
    splits = min(-(-needs.max_context // 512), 32)  # of a long context, see kernels/cuda_attention.py
    attended = captured * s.heads * splits * 4 * 9 // 8  # in fp32, with the softmax's state
    largest = 2 * s.inner * s.hidden
    unpacked = largest * (2 * needs.element_bytes if needs.has_graphs else 16)
    moved = needs.max_lora_rank * _row_bytes(needs)  # an adapter whose rows are moved together
    return activations + logits + attended + unpacked + moved + _FIXED_BYTES


def _bytes_per_token(needs: Needs) -> tuple[int, int]:
    """Of the KV cache; and of the copy that a step with prefill makes of one layer's (twice: prefixes are shared)."""
    cached = kv_bytes_per_token(needs.config, needs.element_bytes)
    return cached, 2 * cached // _Sizes.of(needs.config).layers + 64
