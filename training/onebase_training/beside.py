"""A training process beside a server on the same home: it uses the server's base, and makes way for requests.

Puts together what the other modules do (shared_base.py, yielding.py, boundaries.py), for a run and for an evaluation.
Without a server all of it comes to nothing: an own base, no waiting.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from onebase.base_model import ComputeDtype, LoadedBase, load_base
from onebase.bases import BaseSpec
from onebase.errors import OnebaseError
from onebase.tokenizer import TextTokenizer
from onebase_training.boundaries import Boundaries
from onebase_training.shared_base import Borrowed, find_shared
from onebase_training.yielding import Yielder

logger = logging.getLogger(__name__)

_SIGN_OF_LIFE_S = 10.0


class Beside:
    """One process' relation to the servers that keep notes in `folder` (`Home.serving`).

    `sign_of_life(message)` is called now and then, while it waits and at the layers of a model that it watches (with
    "" when there is nothing to say); `hurries()`: no more waiting between layers.
    """

    def __init__(
        self,
        folder: Path,
        policy: str,
        device: torch.device,
        *,
        sign_of_life: Callable[[str], None] = lambda message: None,
        hurries: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder, self._device = folder, device
        self._sign_of_life = sign_of_life
        self._signed_at = time.monotonic()
        self._borrowed: Borrowed | None = None
        self._yielder = Yielder(folder, policy, str(device), hurries=hurries, on_wait=lambda: self._sign(""))
        self._boundaries = Boundaries(self._yielder, self._at_layer, device)

    def load_base(
        self, spec: BaseSpec, tokenizer: TextTokenizer, dtype: ComputeDtype, *, may_share: bool = True
    ) -> LoadedBase:
        """The server's base where there is one, else one of our own."""
        if may_share:
            loading = "waiting for the server to load its base"
            borrowed = find_shared(self._folder, spec, self._device, on_wait=lambda: self._sign(loading))
            if borrowed is not None:
                try:
                    loaded = borrowed.load(spec, tokenizer, self._device, getattr(torch, dtype))
                except (OSError, OnebaseError, RuntimeError, KeyError, AttributeError) as error:
                    logger.warning("the server's base can't be used, so this run loads its own: %r", error)
                else:
                    self._borrowed = borrowed
                    return loaded
        return load_base(spec, self._device, compute_dtype=dtype, tokenizer=tokenizer)

    def guard(self) -> None:
        """Raises ServerGone once nothing that is computed now can be trusted."""
        if self._borrowed is not None:
            self._borrowed.require_owner()

    def watch(self, model: nn.Module) -> None:
        """Make way between the layers of this model from now on."""
        self._boundaries.install(model)

    @property
    def between(self) -> Callable[[], None]:
        """To be called between pieces of work outside the layers."""
        return self._boundaries.reached

    @property
    def waited_s(self) -> float:
        """Seconds given to requests so far."""
        return self._yielder.waited_s

    def _at_layer(self) -> None:
        self.guard()
        self._sign("")

    def _sign(self, message: str) -> None:
        now = time.monotonic()
        if now - self._signed_at >= _SIGN_OF_LIFE_S:
            self._signed_at = now
            self._sign_of_life(message)
