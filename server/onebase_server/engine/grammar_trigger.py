"""Free text until it opens a block that a grammar rules (a tool call): from there on only what the grammar allows.

A call is not ended by stop strings, nor is one that the grammar demands or allows from the first token. While the text
is free there is no mask and nothing to pay but a look at each token's last bytes. Masks begin where a
token could both complete the opening and go on in a way that the grammar forbids. Knows bytes, and no grammar's syntax.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from onebase_server.engine.detokenizer import TokenBytes
from onebase_server.engine.grammar import GrammarMatcher, Mask
from onebase_server.engine.types import GrammarTrigger

START = b"\xff"
"""Stands for the answer's beginning: no UTF-8 text holds this byte."""


class TriggerTable:
    """What a vocabulary's tokens can do to a trigger. Made once, shared by all sequences, never changed."""

    def __init__(self, trigger: GrammarTrigger, tokenizer: TokenBytes) -> None:
        opening = trigger.opening.encode()
        leads = (b"\n\n", START) if trigger.own_paragraph else (b"",)
        self.opening = opening
        self.patterns = tuple(lead + opening for lead in leads)
        self.reach = max(map(len, self.patterns)) - 1
        """Bytes of the text that a later token may still complete to an opening."""
        self.masks: dict[bytes, Mask] = {}
        """End of the text -> the tokens that may follow it; any may follow what is not among these ends."""
        for end, token_id in self._forbidden(tokenizer, trigger.goes_on.encode()):
            if end not in self.masks:
                self.masks[end] = np.full(-(-tokenizer.vocab_size // 32), -1, dtype=np.int32)
            self.masks[end].view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self.ends = tuple(self.masks)

    def _forbidden(self, tokenizer: TokenBytes, goes_on: bytes) -> Iterator[tuple[bytes, int]]:
        """(end of the text, token): the token would complete an opening there and break the grammar behind it."""
        rests = tuple({pattern[size:] for pattern in self.patterns for size in range(len(pattern))})
        for token_id in range(tokenizer.vocab_size):
            raw = tokenizer.token_bytes(token_id)
            if raw.startswith(rests):
                broken = [r for r in rests if raw.startswith(r) and not goes_on.startswith(raw[len(r) :])]
                yield from ((p[: -len(r)], token_id) for r in broken for p in self.patterns if p.endswith(r))
            for pattern in self.patterns:
                place = raw.find(pattern)
                if place > 0 and not goes_on.startswith(raw[place + len(pattern) :]):
                    yield b"", token_id


class TriggeredMatcher:
    """A `GrammarMatcher`. `inner` stands at the start of the grammar, which begins with the opening."""

    def __init__(
        self,
        inner: GrammarMatcher,
        table: TriggerTable,
        token_bytes: Callable[[int], bytes],
        encode: Callable[[str], list[int]],
        end: bytes = START,
    ) -> None:
        self._inner = inner
        self._table = table
        self._token_bytes = token_bytes
        self._encode = encode
        self._end = end
        """The text's last bytes, as far as they matter."""
        self._is_bound = False

    @property
    def heeds_stops(self) -> bool:
        """Stop strings end free text; inside a call they are text like any other."""
        return not self._is_bound

    def fork(self) -> "TriggeredMatcher":
        twin = TriggeredMatcher(self._inner.fork(), self._table, self._token_bytes, self._encode, self._end)
        twin._is_bound = self._is_bound
        return twin

    @property
    def rules(self) -> bool:
        return self._inner.rules if self._is_bound else self._end.endswith(self._table.ends)

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        if self._is_bound:
            self._inner.fill_mask(mask)
            return
        mask[:] = -1
        for end in self._table.ends:
            if self._end.endswith(end):
                mask &= self._table.masks[end]

    def accept(self, token_id: int) -> None:
        if self._is_bound:
            self._inner.accept(token_id)
            return
        text = self._end + self._token_bytes(token_id)
        for pattern in self._table.patterns:
            place = text.find(pattern)
            if place >= 0:
                self._bind(text[place + len(pattern) :])
                return
        self._end = text[-self._table.reach :]

    def _bind(self, beyond: bytes) -> None:
        """The opening has been said, and `beyond` with it."""
        self._is_bound = True
        for token_id in self._encode((self._table.opening + beyond).decode(errors="replace")):
            self._inner.accept(token_id)


class AtOnceMatcher:
    """A `GrammarMatcher` whose grammar rules from the first token: an answer that begins with the opening is a call."""

    def __init__(
        self, inner: GrammarMatcher, opening: bytes, token_bytes: Callable[[int], bytes], begin: bytes = b""
    ) -> None:
        self._inner = inner
        self._opening = opening
        self._token_bytes = token_bytes
        self._begin = begin
        """The answer's first bytes, as far as they matter."""

    @property
    def heeds_stops(self) -> bool:
        """Not in what may become a call either: the grammar's other answers begin in another way."""
        return not (self._begin.startswith(self._opening) or self._opening.startswith(self._begin))

    def fork(self) -> "AtOnceMatcher":
        return AtOnceMatcher(self._inner.fork(), self._opening, self._token_bytes, self._begin)

    @property
    def rules(self) -> bool:
        return self._inner.rules

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        self._inner.fill_mask(mask)

    def accept(self, token_id: int) -> None:
        self._inner.accept(token_id)
        if len(self._begin) < len(self._opening):
            self._begin += self._token_bytes(token_id)
