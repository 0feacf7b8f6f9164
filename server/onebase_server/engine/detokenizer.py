"""Token ids to text, one token at a time, and the watch for stop strings.

Text comes out only when it is final: never half a UTF-8 character, never a stop string or what may become one.
The result depends on the bytes alone and not on how tokens split them. Knows tokens' bytes, nothing else.
"""

import codecs
from typing import Protocol

from onebase_server.engine.types import TokenLogprob


class TokenBytes(Protocol):
    """What is asked of a tokenizer (core's TextTokenizer has it)."""

    @property
    def vocab_size(self) -> int: ...

    def token_bytes(self, token_id: int, /) -> bytes:
        """Raw bytes of one token; empty for control tokens."""
        ...


class TokenTable:
    """Bytes and, where a token is whole characters by itself, text of every token met. One for all sequences."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}
        self._bytes: dict[int, bytes] = {}

    def text(self, token_id: int) -> str | None:
        """The token's text if its bytes are valid UTF-8 alone, else None."""
        try:
            return self._texts[token_id]
        except KeyError:
            return self._learn(token_id)

    def bytes(self, token_id: int) -> bytes:
        if token_id not in self._bytes:
            self._learn(token_id)
        return self._bytes[token_id]

    def _learn(self, token_id: int) -> str | None:
        raw = self._tokenizer.token_bytes(token_id) if 0 <= token_id < self._tokenizer.vocab_size else b""
        text: str | None
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = None
        self._bytes[token_id] = raw
        self._texts[token_id] = text
        return text


class StopStrings:
    """Finds the first stop string to be complete, and text that may still become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)

    def __bool__(self) -> bool:
        return bool(self._stops)

    def find(self, text: str) -> int | None:
        """Where the stop string that is complete first begins (of those, the longest), or None."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            begin = text.find(stop)
            if begin >= 0:
                candidate = (begin + len(stop), begin)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[1]

    def held_from(self, text: str) -> int:
        """Text before this index can't be part of a stop string any more."""
        held = len(text)
        for stop in self._stops:
            begin = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= begin < held:
                if stop.startswith(text[begin:]):
                    held = begin
                    break
                begin = text.find(stop[0], begin + 1)
        return held


class Detokenizer:
    """One sequence's text. `push` tokens in order, `take` what is final, `flush` at an end that is no stop string."""

    __slots__ = ("_decoded", "_decoder", "_emitted", "_held", "_partial", "_ready", "_stops", "_table", "_tokens")

    def __init__(self, table: TokenTable, stops: tuple[str, ...] = ()) -> None:
        self._table = table
        self._stops = StopStrings(stops)
        self._decoder: codecs.IncrementalDecoder | None = None
        self._partial = False
        """Bytes of an unfinished character are in the decoder."""
        self._held = ""
        """Decoded, not final."""
        self._ready = ""
        """Final, not taken."""
        self._decoded = 0
        self._emitted = 0
        """Characters decoded, and made final, since the start."""
        self._tokens: list[tuple[int, TokenLogprob | None, int, int]] = []
        """Tokens not taken yet: id, logprob, and the characters [begin, end) of the text that they touch."""

    def push(self, token_id: int, logprob: TokenLogprob | None = None, *, check_stops: bool = True) -> bool:
        """Add a token. True: a stop string is complete; text from it on is dropped, and no more may be pushed."""
        begin = self._decoded
        text = self._table.text(token_id)
        if text is None or self._partial:
            text = self._decode(self._table.bytes(token_id))
        self._decoded = begin + len(text)
        self._tokens.append((token_id, logprob, begin, self._decoded + self._partial))
        if not self._stops or not check_stops:
            self._make_final(self._held + text)
            self._held = ""
            return False
        held = self._held + text
        stop = self._stops.find(held)
        if stop is not None:
            self._make_final(held[:stop])
            self._held = ""
            self._tokens = [token for token in self._tokens if token[2] < self._emitted or token[3] <= self._emitted]
            self._end_here()
            return True
        final = self._stops.held_from(held)
        self._make_final(held[:final])
        self._held = held[final:]
        return False

    def flush(self) -> None:
        """No more tokens: what was held is final. Bytes of an unfinished character are dropped."""
        self._make_final(self._held)
        self._held = ""
        self._partial = False
        self._end_here()

    def take(self) -> tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Text that became final since the last call, with the tokens whose text is all out, and their logprobs."""
        text, self._ready = self._ready, ""
        tokens = self._tokens
        if not tokens:
            return text, (), ()
        if tokens[-1][3] <= self._emitted:
            done, self._tokens = tokens, []
        else:
            count = 0
            while tokens[count][3] <= self._emitted:
                count += 1
            done, self._tokens = tokens[:count], tokens[count:]
        ids = tuple([token[0] for token in done])
        if done and done[0][1] is not None:
            return text, ids, tuple([token[1] for token in done if token[1] is not None])
        return text, ids, ()

    def _end_here(self) -> None:
        """No text will follow: tokens whose text was cut off have all that they get."""
        self._decoded = self._emitted
        self._tokens = [(token, logprob, begin, min(end, self._emitted)) for token, logprob, begin, end in self._tokens]

    def _make_final(self, text: str) -> None:
        if text:
            self._ready += text
            self._emitted += len(text)

    def _decode(self, raw: bytes) -> str:
        if self._decoder is None:
            self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = self._decoder.decode(raw)
        self._partial = bool(self._decoder.getstate()[0])
        return text
