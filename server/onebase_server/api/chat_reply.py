"""A chat's token events -> OpenAI's reply: one object, or the chunks of a stream. The order of chunks is contract:

role of every choice, content, each choice's finish, usage if asked for, `[DONE]`.
"""

import secrets
from collections.abc import AsyncIterator

from pydantic_core import to_json

from onebase.tokenizer import TextTokenizer
from onebase_server.api.chat_plan import ChatPlan
from onebase_server.api.generation import raise_if_failed, sum_usage
from onebase_server.api.logprobs import chat_logprobs
from onebase_server.api.schemas_chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChunkChoice,
    FinishWord,
)
from onebase_server.api.schemas_common import UsageBody
from onebase_server.api.sse import event
from onebase_server.api.tool_calls import CallWatch, call_deltas, with_ids
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import FinishReason, TokenEvent, TokenLogprob, Usage

HOLE = f"onebase-{secrets.token_hex(8)}"
"""Where the text goes in a frame: nobody can have put this anywhere else in it."""
WORDS: dict[FinishReason, FinishWord] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def finish_word(reason: FinishReason, has_calls: bool = False) -> FinishWord:
    return "tool_calls" if has_calls and reason is FinishReason.STOP else WORDS[reason]


def chat_completion(
    plan: ChatPlan, choices: list[Completion], tokenizer: TextTokenizer, fingerprint: str
) -> ChatCompletion:
    return ChatCompletion(
        id=plan.id,
        object="chat.completion",
        created=plan.created,
        model=plan.model.id,
        choices=[_choice(plan, choice, tokenizer) for choice in choices],
        usage=sum_usage([choice.usage for choice in choices]),
        system_fingerprint=fingerprint,
    )


def _choice(plan: ChatPlan, choice: Completion, tokenizer: TextTokenizer) -> ChatChoice:
    message = AssistantMessage(role="assistant", content=choice.text, refusal=None)
    if plan.finds_calls:
        parsed = plan.model.renderer.parse_text(choice.text)
        message.content = parsed.content
        if parsed.tool_calls:
            message = AssistantMessage(
                role="assistant",
                content=parsed.content or None,
                refusal=None,
                tool_calls=with_ids(parsed.tool_calls[: 1 if plan.one_call else None]),
            )
    return ChatChoice(
        index=choice.index,
        message=message,
        logprobs=chat_logprobs(choice.logprobs, tokenizer) if plan.wants_logprobs else None,
        finish_reason=finish_word(choice.finish_reason, bool(message.tool_calls)),
    )


class ChatStream:
    """The chunks of one streamed chat, as events ready to send."""

    def __init__(self, plan: ChatPlan, tokenizer: TextTokenizer, fingerprint: str) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        renderer = plan.model.renderer
        layout = renderer.call_layout if plan.finds_calls else None
        marker = layout.before.rstrip() if layout else ""
        self._watches = [CallWatch(marker, renderer.parse_text) for _ in range(plan.n)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(plan.n)]
        self._usages = [Usage(0, 0)] * plan.n
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    async def events(self, tokens: AsyncIterator[TokenEvent]) -> AsyncIterator[bytes]:
        # NOTE: every role first, in order: the Python helper appends each new index to a list
        roles = [self._delta(i, ChatDelta(role="assistant", content="", refusal=None)) for i in range(self._plan.n)]
        yield b"".join(roles)
        async for token in tokens:
            raise_if_failed(token)
            chunks = self._chunks(token)
            if chunks:
                yield b"".join(chunks)  # made at once, sent at once: each send is a call into the kernel
        if self._plan.include_usage:
            yield self._chunk([], sum_usage(self._usages))

    def _chunks(self, token: TokenEvent) -> list[bytes]:
        index = token.index
        watch, pending = self._watches[index], self._logprobs[index]
        pending.extend(token.logprobs)
        chunks = []
        text = watch.feed(token.text) if self._plan.finds_calls else token.text
        if text:
            chunks.append(self._content(index, text))
        if token.finish_reason is None:
            return chunks
        has_calls = False
        if self._plan.finds_calls:
            rest, calls = watch.finish()
            has_calls = bool(calls)
            if rest:
                chunks.append(self._content(index, rest))
            for delta in call_deltas(calls[: 1 if self._plan.one_call else None]):
                chunks.append(self._delta(index, ChatDelta(tool_calls=[delta]), self._take_logprobs(index)))
        left = self._take_logprobs(index)
        if left is not None:  # of tokens without text: half a character at the end, a control token
            chunks.append(self._delta(index, ChatDelta(content=""), left))
        if token.usage is not None:
            self._usages[index] = token.usage
        word = finish_word(token.finish_reason, has_calls)
        chunks.append(self._delta(index, ChatDelta(), None, word))
        return chunks

    def _content(self, index: int, text: str) -> bytes:
        """A piece of text. Without logprobs two of these differ in the text alone: the rest is written once."""
        if self._plan.wants_logprobs:
            return self._delta(index, ChatDelta(content=text), self._take_logprobs(index))
        frame = self._frames.get(index)
        if frame is None:
            head, tail = self._delta(index, ChatDelta(content=HOLE)).rsplit(to_json(HOLE), 1)
            frame = self._frames[index] = head, tail
        return frame[0] + to_json(text) + frame[1]

    def _take_logprobs(self, index: int) -> ChatLogprobs | None:
        """The entries since the last text: those of held-back text go out with it."""
        pending = self._logprobs[index]
        if not self._plan.wants_logprobs or not pending:
            return None
        self._logprobs[index] = []
        return chat_logprobs(pending, self._tokenizer)

    def _delta(
        self, index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish: FinishWord | None = None
    ) -> bytes:
        return self._chunk([ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)])

    def _chunk(self, choices: list[ChunkChoice], usage: UsageBody | None = None) -> bytes:
        chunk = ChatChunk(
            id=self._plan.id,
            object="chat.completion.chunk",
            created=self._plan.created,
            model=self._plan.model.id,
            system_fingerprint=self._fingerprint,
            choices=choices,
        )
        if self._plan.include_usage:
            chunk.usage = usage  # set, so that it is sent: null in all chunks but the last
        return event(chunk)
