"""Which layers keep their activations for the backward pass and which compute them again: memory against time.

Computing again costs a third of a step, and on a large GPU most layers need not. How many may keep is found by
measuring, not by a formula: see preflight.py. It must not know data or the loss.
"""

from typing import Any

import torch
from torch import nn

from onebase_training.decoder_layer import DecoderLayerForward

SHARE_OF_FREE = 0.85
"""Of the free memory, when no limit is given: the rest is for the allocator's gaps between rows of other lengths."""


class Recompute:
    """The decoder layers of a base with gradient checkpointing on. `limit_gb` (10^9 bytes): what a step may take;
    None: most of the memory that is free."""

    def __init__(self, base_model: Any, limit_gb: float | None) -> None:
        self._layers: list[nn.Module] = list(base_model.model.layers)
        self.limit_gb = limit_gb
        self.kept = 0

    def __len__(self) -> int:
        return len(self._layers)

    def keep(self, count: int) -> None:
        """The last `count` layers keep. They go back first, so theirs is free again once others compute anew."""
        self.kept = count
        for index, layer in enumerate(self._layers):
            again = index < len(self._layers) - count
            if isinstance(layer.forward, DecoderLayerForward):
                layer.forward.recompute = again
            else:
                layer.gradient_checkpointing = again  # type: ignore[assignment]


def layers_that_fit(limit: float, peak_without: float, per_layer: float, layers: int) -> int:
    """How many may keep below `limit` bytes, when a step with none reaches `peak_without` and each adds `per_layer`."""
    if per_layer <= 0:
        return 0
    return max(0, min(layers, int((limit - peak_without) // per_layer)))


def memory_limit(limit_gb: float | None, device: torch.device) -> float:
    """Bytes that this process's tensors may take on a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    within_reach = free + torch.cuda.memory_reserved(device)
    return min(limit_gb * 1e9, within_reach) if limit_gb is not None else within_reach * SHARE_OF_FREE
