"""Constrained decoding as the engine sees it: a matcher a sequence, one packed bitmask a token.

The backend compiles off the engine thread. Nothing here knows a grammar's syntax.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onebase_server.engine.types import GrammarTrigger

Mask = NDArray[np.int32]


class GrammarMatcher(Protocol):
    """Where one sequence stands in its grammar. Used by one thread at a time."""

    @property
    def heeds_stops(self) -> bool:
        """Whether a stop string ends the answer here."""
        ...

    @property
    def rules(self) -> bool:
        """Whether there are tokens that may not come next. Costs nothing to ask, unlike the mask."""
        ...

    def fork(self) -> "GrammarMatcher":
        """An independent matcher at the same place (n > 1)."""
        ...

    def fill_mask(self, mask: Mask) -> None:
        """The tokens allowed next, word i // 32, bit i % 32; eos is allowed where the grammar may end. Asked only
        where the grammar `rules`."""
        ...

    def accept(self, token_id: int) -> None:
        """The token was sampled. Raises EngineError if the grammar forbids it."""
        ...


class GrammarBackend(Protocol):
    """Compiles grammars for one tokenizer."""

    def compile(self, grammar: str, trigger: GrammarTrigger | None = None) -> GrammarMatcher:
        """A matcher at the start; with a trigger that is not `at_once`, free text comes first. Thread-safe, may take
        milliseconds. Raises InvalidInput."""
        ...
