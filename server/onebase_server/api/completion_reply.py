"""Token events of one or more prompts -> the reply of `/v1/completions`, whole or streamed."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from math import inf
from statistics import fmean
from typing import Literal

from onebase.tokenizer import TextTokenizer
from onebase_server.api.backend import Handle
from onebase_server.api.completion_plan import CompletionPlan
from onebase_server.api.generation import complete, raise_if_failed, sum_usage
from onebase_server.api.logprobs import TextOffsets, completion_logprobs, echo_logprobs, joined
from onebase_server.api.schemas_common import UsageBody
from onebase_server.api.schemas_completions import Completion as CompletionBody
from onebase_server.api.schemas_completions import CompletionChoice
from onebase_server.api.sse import event
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import FinishReason, TokenEvent, Usage


def finish_word(reason: FinishReason) -> Literal["stop", "length"]:
    return "length" if reason is FinishReason.LENGTH else "stop"


async def complete_all(handles: Sequence[Handle]) -> list[Completion]:
    """All choices of all prompts, in order."""
    per_prompt = await asyncio.gather(*(complete(handle) for handle in handles))
    return [choice for choices in per_prompt for choice in choices]


def text_completion(
    plan: CompletionPlan, choices: Sequence[Completion], tokenizer: TextTokenizer, fingerprint: str
) -> CompletionBody:
    """`choices`: `best_of` for each prompt. What was generated counts in the usage, returned or not."""
    best = [each for start in range(0, len(choices), plan.best_of) for each in best_of(plan, choices[start:])]
    return CompletionBody(
        id=plan.id,
        object="text_completion",
        created=plan.created,
        model=plan.model.id,
        choices=[_choice(plan, i, choice, tokenizer) for i, choice in enumerate(best)],
        usage=sum_usage([choice.usage for choice in choices], len(plan.requests)),
        system_fingerprint=fingerprint,
    )


def best_of(plan: CompletionPlan, choices: Sequence[Completion]) -> Sequence[Completion]:
    """The first prompt's choices to return: those with the highest log probability a token, the best first."""
    if plan.best_of == plan.n:
        return choices[: plan.n]
    return sorted(choices[: plan.best_of], key=mean_logprob, reverse=True)[: plan.n]


def mean_logprob(choice: Completion) -> float:
    """An empty answer comes last: there is no token to judge it by."""
    return fmean(each.logprob for each in choice.logprobs) if choice.logprobs else -inf


def _choice(plan: CompletionPlan, index: int, choice: Completion, tokenizer: TextTokenizer) -> CompletionChoice:
    echo, logprobs = plan.echoes[index // plan.n], None
    if plan.wants_logprobs:
        logprobs = completion_logprobs(choice.logprobs, tokenizer, TextOffsets(len(echo)))
    if plan.scores_prompt and logprobs is not None:
        prompt = plan.requests[index // plan.n].prompt_ids
        logprobs = joined(echo_logprobs(prompt, choice.prompt_logprobs, echo, tokenizer), logprobs)
    return CompletionChoice(
        text=echo + choice.text,
        index=index,
        logprobs=logprobs,
        finish_reason=finish_word(choice.finish_reason),
    )


class CompletionStream:
    """The events of one streamed text completion."""

    def __init__(self, plan: CompletionPlan, tokenizer: TextTokenizer, fingerprint: str) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        choices = plan.n * len(plan.requests)
        self._usages = [Usage(0, 0)] * choices
        self._offsets = [TextOffsets(len(plan.echoes[index // plan.n])) for index in range(choices)]
        self._echoed = [False] * choices

    async def events(self, handles: Sequence[Handle]) -> AsyncIterator[bytes]:
        for index in range(len(self._usages)):
            echo = self._plan.echoes[index // self._plan.n]
            if echo and not self._plan.scores_prompt:
                yield self._piece(CompletionChoice(text=echo, index=index, logprobs=None, finish_reason=None))
        async for offset, token in merged(handles, self._plan.n):
            raise_if_failed(token)
            for choice in self._choices(offset + token.index, token):
                yield self._piece(choice)
        if self._plan.include_usage:
            yield self._body([], sum_usage(self._usages, len(self._plan.requests)))

    def _choices(self, index: int, token: TokenEvent) -> list[CompletionChoice]:
        choices = []
        if self._plan.scores_prompt and not self._echoed[index]:
            self._echoed[index] = True
            choices.append(self._scored_echo(index, token))
        if token.text or token.logprobs:
            logprobs = None
            if self._plan.wants_logprobs:
                logprobs = completion_logprobs(token.logprobs, self._tokenizer, self._offsets[index])
            choices.append(CompletionChoice(text=token.text, index=index, logprobs=logprobs, finish_reason=None))
        if token.finish_reason is not None:
            self._usages[index] = token.usage or self._usages[index]
            choices.append(
                CompletionChoice(text="", index=index, logprobs=None, finish_reason=finish_word(token.finish_reason))
            )
        return choices

    def _scored_echo(self, index: int, token: TokenEvent) -> CompletionChoice:
        """The prompt with its logprobs, which a choice's first event brings."""
        prompt = index // self._plan.n
        echo, ids = self._plan.echoes[prompt], self._plan.requests[prompt].prompt_ids
        logprobs = echo_logprobs(ids, token.prompt_logprobs, echo, self._tokenizer)
        return CompletionChoice(text=echo, index=index, logprobs=logprobs, finish_reason=None)

    def _piece(self, choice: CompletionChoice) -> bytes:
        return self._body([choice])

    def _body(self, choices: list[CompletionChoice], usage: UsageBody | None = None) -> bytes:
        body = CompletionBody(
            id=self._plan.id,
            object="text_completion",
            created=self._plan.created,
            model=self._plan.model.id,
            choices=choices,
            system_fingerprint=self._fingerprint,
        )
        if self._plan.include_usage:
            body.usage = usage
        return event(body)


async def merged(handles: Sequence[Handle], n: int) -> AsyncIterator[tuple[int, TokenEvent]]:
    """Events of several requests as they come, each with the number of choices before its request."""
    if len(handles) == 1:
        async for token in handles[0].events():
            yield 0, token
        return
    # One slot: a reader that is slow keeps its events merged in the handles and not here.
    queue: asyncio.Queue[tuple[int, TokenEvent] | None] = asyncio.Queue(maxsize=1)

    async def pump(offset: int, handle: Handle) -> None:
        async for token in handle.events():
            await queue.put((offset, token))
        await queue.put(None)

    tasks = [asyncio.ensure_future(pump(i * n, handle)) for i, handle in enumerate(handles)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
