"""Where a training process stops to look around: before each decoder layer, forward and backward. Torch lives here.

On CUDA the host runs far ahead of the device, so that a wait of the host would be felt by nobody: it is held to one
layer ahead while it makes way for a server, and to a few beside an idle one. Nothing here changes a number.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from onebase_training.yielding import Yielder

_CLOSE: Final = 1
_LOOSE: Final = 4
"""Layers that the host may be ahead: one where a wait is to be felt; otherwise enough that its own pauses are not."""


class Boundaries:
    """`install` once on a model. `guard` raises when training must not go on (the base's memory has gone)."""

    def __init__(self, yielder: Yielder, guard: Callable[[], None], device: torch.device) -> None:
        self._yielder, self._guard = yielder, guard
        self._pace = _Pace() if device.type == "cuda" else None

    def install(self, model: nn.Module) -> int:
        """On every decoder layer of a Llama-family model, whatever wraps it; how many there are."""
        layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
        for layer in layers:
            layer.register_forward_pre_hook(self._before_forward)
            layer.register_forward_hook(self._before_backward)
        return len(layers)

    def reached(self) -> None:
        """The next piece of work may begin."""
        self._guard()
        if self._pace is not None and self._yielder.has_servers:
            self._pace.keep(_CLOSE if self._yielder.holds_back else _LOOSE)
        self._yielder.at_boundary()

    def _before_forward(self, _module: nn.Module, _inputs: Any) -> None:
        self.reached()

    def _before_backward(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """The gradient of a layer's output is known: its backward pass comes next."""
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def _on_gradient(self, _gradient: Tensor) -> None:
        self.reached()


class _Pace:
    """Lets the host be so many layers ahead of the device, no more: the device stays fed, and a wait takes effect."""

    def __init__(self) -> None:
        self._ahead: deque[torch.cuda.Event] = deque()

    def keep(self, layers: int) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._ahead.append(event)
        while len(self._ahead) > layers:
            self._ahead.popleft().synchronize()
