"""A chat's token events -> OpenAI's reply: one object, or the chunks of a stream. The order of chunks is contract:

role of every choice, content, each choice's finish, usage if asked for, `[DONE]`.
"""

import secrets
from collections.abc import AsyncIterator

from pydantic_core import to_json

from onebase.tokenizer import TextTokenizer
from onebase_server.api.chat_plan import ChatPlan
from onebase_server.api.generation import raise_if_failed, sum_usage
from onebase_server.api.logprobs import WaitingLogprobs, chat_logprobs
from onebase_server.api.schemas_chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChunkChoice,
    FinishWord,
    FunctionDelta,
    ToolCallDelta,
)
from onebase_server.api.schemas_common import UsageBody
from onebase_server.api.sse import event
from onebase_server.api.tool_calls import CallReader, Piece, new_call_id, read_answer, with_ids
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import FinishReason, TokenEvent, Usage

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
        renderer = plan.model.renderer
        message.content, calls = read_answer(choice.text, renderer.call_layout, renderer.parse_text)
        if calls:
            content = message.content or None
            message = AssistantMessage(role="assistant", content=content, refusal=None, tool_calls=with_ids(calls))
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
        self._fingerprint = fingerprint
        renderer = plan.model.renderer
        self._readers = [CallReader(renderer.call_layout, renderer.parse_text) for _ in range(plan.n)]
        self._logprobs = [WaitingLogprobs(tokenizer) for _ in range(plan.n)]
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
        if self._plan.wants_logprobs:
            self._logprobs[index].add(token.logprobs)
        if not self._plan.finds_calls:
            chunks = [self._content(index, token.text, None)] if token.text else []
        else:
            chunks = self._pieces(index, self._readers[index].feed(token.text))
        if token.finish_reason is None:
            return chunks
        reader = self._readers[index]
        if self._plan.finds_calls:
            chunks += self._pieces(index, reader.finish())
        left = self._take_logprobs(index, None)
        if left is not None:  # of tokens without text to show: half a character at the end, a call's last bracket
            nothing = ChatDelta(content="") if not reader.calls else _more_arguments(len(reader.calls) - 1, "")
            chunks.append(self._delta(index, nothing, left))
        if token.usage is not None:
            self._usages[index] = token.usage
        word = finish_word(token.finish_reason, bool(reader.calls))
        chunks.append(self._delta(index, ChatDelta(), None, word))
        return chunks

    def _pieces(self, index: int, pieces: list[Piece]) -> list[bytes]:
        """The order that accumulators are written for: a call's head, then its arguments bit by bit."""
        chunks = []
        for piece in pieces:
            if piece.call is None:
                chunks.append(self._content(index, piece.text, piece.end))
            elif piece.name is not None:
                function = FunctionDelta(name=piece.name, arguments="")
                head = ToolCallDelta(index=piece.call, id=new_call_id(), type="function", function=function)
                chunks.append(self._delta(index, ChatDelta(tool_calls=[head]), self._take_logprobs(index, piece.end)))
            else:
                delta = _more_arguments(piece.call, piece.text)
                chunks.append(self._delta(index, delta, self._take_logprobs(index, piece.end)))
        return chunks

    def _content(self, index: int, text: str, end: int | None) -> bytes:
        """A piece of text. Without logprobs two of these differ in the text alone: the rest is written once."""
        if self._plan.wants_logprobs:
            return self._delta(index, ChatDelta(content=text), self._take_logprobs(index, end))
        frame = self._frames.get(index)
        if frame is None:
            head, tail = self._delta(index, ChatDelta(content=HOLE)).rsplit(to_json(HOLE), 1)
            frame = self._frames[index] = head, tail
        return frame[0] + to_json(text) + frame[1]

    def _take_logprobs(self, index: int, end: int | None) -> ChatLogprobs | None:
        """The entries since the last piece up to the character `end`: of what was held back and is not shown too."""
        if not self._plan.wants_logprobs:
            return None
        entries = self._logprobs[index].take(end)
        return ChatLogprobs(content=entries, refusal=None) if entries else None

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


def _more_arguments(call: int, text: str) -> ChatDelta:
    return ChatDelta(tool_calls=[ToolCallDelta(index=call, function=FunctionDelta(arguments=text))])
