"""Token logprobs as OpenAI shows them, in the chat form and in the older form of text completions."""

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


def echo_logprobs(
    prompt_ids: Sequence[int], scores: Sequence[TokenLogprob], entries: Sequence[TokenLogprob], tokenizer: TextTokenizer
) -> CompletionLogprobs:
    """The prompt's tokens, then the answer's. Nothing stands before the first token: it has no logprob."""
    shown = completion_logprobs([TokenLogprob(prompt_ids[0], 0.0), *scores, *entries], tokenizer)
    shown.token_logprobs[0] = None
    if shown.top_logprobs is not None:
        shown.top_logprobs[0] = None
    return shown


def completion_logprobs(
    entries: Sequence[TokenLogprob], tokenizer: TextTokenizer, *, offset: int = 0
) -> CompletionLogprobs:
    """`offset`: characters of the text before the first entry."""
    tokens, offsets = [], []
    for each in entries:
        token = _show(tokenizer.token_bytes(each.token_id))
        tokens.append(token)
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[finite(each.logprob) for each in entries],
        top_logprobs=[_top_map(each, tokenizer) for each in entries],
        text_offset=offsets,
    )


def _top_map(each: TokenLogprob, tokenizer: TextTokenizer) -> dict[str, float]:
    # Two ids may show alike (bytes of one character): the likelier one keeps the place, as it comes first.
    shown: dict[str, float] = {}
    for token_id, logprob in each.top:
        shown.setdefault(_show(tokenizer.token_bytes(token_id)), finite(logprob))
    return shown
