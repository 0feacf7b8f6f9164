"""Token logprobs as OpenAI shows them, in the chat form and in the older form of text completions."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from onebase.tokenizer import TextTokenizer
from onebase_server.api.schemas_chat import ChatLogprobs, LogprobEntry, TopLogprob
from onebase_server.api.schemas_completions import CompletionLogprobs
from onebase_server.engine.types import TokenLogprob

MINUS_INFINITY = -9999.0
"""OpenAI's stand-in: JSON has no infinity."""


def finite(logprob: float) -> float:
    return logprob if logprob > MINUS_INFINITY else MINUS_INFINITY


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: TextTokenizer) -> ChatLogprobs:
    return ChatLogprobs(content=[_entry(each, tokenizer) for each in entries], refusal=None)


def _entry(each: TokenLogprob, tokenizer: TextTokenizer) -> LogprobEntry:
    raw = tokenizer.token_bytes(each.token_id)
    top = [_top(token_id, logprob, tokenizer) for token_id, logprob in each.top]
    return LogprobEntry(token=_show(raw), logprob=finite(each.logprob), bytes=list(raw), top_logprobs=top)


def _top(token_id: int, logprob: float, tokenizer: TextTokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return TopLogprob(token=_show(raw), logprob=finite(logprob), bytes=list(raw))


def _show(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


class TextOffsets:
    """Where each token begins in the text, in characters; one that goes on with a character begins where that does.

    Counts what the detokenizer writes, token by token. `start`: characters in front of the first token.
    """

    def __init__(self, start: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at = start

    def next(self, raw: bytes) -> int:
        begin = self._at
        self._at += len(self._decoder.decode(raw))
        return max(0, begin)


class WaitingLogprobs:
    """Entries of one stream that have not been sent: each goes out with the text that it begins in."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._offsets = TextOffsets()
        self._entries: deque[tuple[int, TokenLogprob]] = deque()

    def add(self, entries: Iterable[TokenLogprob]) -> None:
        for each in entries:
            self._entries.append((self._offsets.next(self._tokenizer.token_bytes(each.token_id)), each))

    def take(self, end: int | None = None) -> list[LogprobEntry]:
        """Those that begin before the character `end` of the generated text; None: all."""
        taken = []
        while self._entries and (end is None or self._entries[0][0] < end):
            taken.append(_entry(self._entries.popleft()[1], self._tokenizer))
        return taken


def echo_logprobs(
    prompt_ids: Sequence[int], scores: Sequence[TokenLogprob], echo: str, tokenizer: TextTokenizer
) -> CompletionLogprobs:
    """The prompt's tokens. Nothing stands before the first one: it has no logprob."""
    # A tokenizer may put a space in front of a text, which is in the first token and not in what is echoed.
    extra = len(tokenizer.decode(prompt_ids)) - len(echo)
    shown = completion_logprobs([TokenLogprob(prompt_ids[0], 0.0), *scores], tokenizer, TextOffsets(-extra))
    shown.token_logprobs[0] = None
    if shown.top_logprobs is not None:
        shown.top_logprobs[0] = None
    return shown


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Both in one; their offsets are of one text."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=(first.top_logprobs or []) + (second.top_logprobs or []),
        text_offset=first.text_offset + second.text_offset,
    )


def completion_logprobs(
    entries: Sequence[TokenLogprob], tokenizer: TextTokenizer, offsets: TextOffsets
) -> CompletionLogprobs:
    """`offsets`: as far as the tokens before these entries."""
    raws = [tokenizer.token_bytes(each.token_id) for each in entries]
    return CompletionLogprobs(
        tokens=[_show(raw) for raw in raws],
        token_logprobs=[finite(each.logprob) for each in entries],
        top_logprobs=[_top_map(each, tokenizer) for each in entries],
        text_offset=[offsets.next(raw) for raw in raws],
    )


def _top_map(each: TokenLogprob, tokenizer: TextTokenizer) -> dict[str, float]:
    # Two ids may show alike (bytes of one character): the likelier one keeps the place, as it comes first.
    shown: dict[str, float] = {}
    for token_id, logprob in each.top:
        shown.setdefault(_show(tokenizer.token_bytes(token_id)), finite(logprob))
    return shown
