"""Constrained decoding as the engine sees it: a matcher a sequence, one packed bitmask a token.

The backend compiles off the engine thread. Nothing here knows a grammar's syntax.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class GrammarMatcher(Protocol):
    """Where one sequence stands in its grammar. Used by one thread at a time."""

    def fork(self) -> "GrammarMatcher":
        """An independent matcher at the same place (n > 1)."""
        ...

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """The tokens allowed next, word i // 32, bit i % 32; eos is allowed where the grammar may end."""
        ...

    def accept(self, token_id: int) -> None:
        """The token was sampled. Raises EngineError if the grammar forbids it."""
        ...


class GrammarBackend(Protocol):
    """Compiles grammars for one tokenizer."""

    def compile(self, grammar: str) -> GrammarMatcher:
        """A matcher at the start. Thread-safe, may take milliseconds. Raises InvalidInput."""
        ...
