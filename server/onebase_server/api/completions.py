"""`POST /v1/completions`: the bare prompt in, text out."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from litestar import Request, post
from litestar.params import JSONBody
from litestar.types import ASGIApp

from onebase_server.api.backend import Handle
from onebase_server.api.caller import caller_of
from onebase_server.api.completion_plan import CompletionPlan, check_completion, plan_completion_aside
from onebase_server.api.completion_reply import CompletionStream, complete_all, text_completion
from onebase_server.api.deps import Deps
from onebase_server.api.replies import json_reply
from onebase_server.api.running import submit_all
from onebase_server.api.schemas_completions import CompletionRequest
from onebase_server.api.sse import EventStream
from onebase_server.api.visible import visible_model
from onebase_server.api.waiting import unless_client_leaves
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import FinishReason, GenerationRequest, TokenEvent, Usage


@post("/completions", operation_id="createCompletion", status_code=200, tags=["Completions"])
async def create_completion(data: JSONBody[CompletionRequest], deps: Deps, request: Request[Any, Any, Any]) -> ASGIApp:
    """Continue one or more bare prompts, without any prompt format."""
    n = check_completion(data, deps.settings.max_choices)
    backend = deps.backend.get()
    model = await visible_model(data.model, caller_of(request), backend, deps)
    plan = await plan_completion_aside(data, n, model, backend)
    running = Running(plan, lambda wanted: submit_all(request, deps, backend, model.id, wanted))
    if data.stream:
        stream = CompletionStream(plan, backend.tokenizer, backend.fingerprint)
        return EventStream(stream.events(running.handles), running.cancel, ping_s=deps.settings.ping_s)
    choices = await unless_client_leaves(request.receive, complete_all(running.handles), running.cancel)
    return json_reply(text_completion(plan, choices, backend.tokenizer, backend.fingerprint))


class Running:
    """The requests of all prompts, submitted together."""

    def __init__(
        self, plan: CompletionPlan, submit_them: Callable[[Sequence[GenerationRequest]], Sequence[Handle]]
    ) -> None:
        self.handles: Sequence[Handle]
        if plan.requests[0].sampling.max_tokens == 0:  # the same for all
            self.handles = [NothingToDo(each) for each in plan.requests]
        else:
            handles = submit_them(plan.requests)
            self.handles = [PromptOnly(each) for each in handles] if plan.only_scores else handles

    def cancel(self) -> None:
        for handle in self.handles:
            handle.cancel()


class PromptOnly:
    """A handle that leaves out what was generated: the engine scores a prompt on its way to a token."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def events(self) -> AsyncIterator[TokenEvent]:
        async for event in self._handle.events():
            usage = event.usage and replace(event.usage, completion_tokens=0)
            ended = FinishReason.LENGTH if event.finish_reason is FinishReason.STOP else event.finish_reason
            yield replace(event, text="", token_ids=(), logprobs=(), finish_reason=ended, usage=usage)

    async def complete(self) -> list[Completion]:
        return [
            replace(
                whole,
                text="",
                token_ids=(),
                logprobs=(),
                finish_reason=FinishReason.LENGTH if whole.finish_reason is FinishReason.STOP else whole.finish_reason,
                usage=replace(whole.usage, completion_tokens=0),
            )
            for whole in await self._handle.complete()
        ]

    def cancel(self) -> None:
        self._handle.cancel()


class NothingToDo:
    """The handle of a request for no tokens at all: ended before it began."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request

    async def events(self) -> AsyncIterator[TokenEvent]:
        for index in range(self._request.n):
            yield TokenEvent(index, finish_reason=FinishReason.LENGTH, usage=self._usage)

    async def complete(self) -> list[Completion]:
        return [Completion(index, "", (), (), FinishReason.LENGTH, self._usage) for index in range(self._request.n)]

    def cancel(self) -> None:
        """There is nothing to end."""

    @property
    def _usage(self) -> Usage:
        return Usage(len(self._request.prompt_ids), 0)
