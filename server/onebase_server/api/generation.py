"""What every generating endpoint does with the engine's results: ends that are errors, OpenAI's usage."""

from collections.abc import Sequence

from onebase.errors import EngineError, NotReady
from onebase_server.api.backend import Handle
from onebase_server.api.schemas_common import CompletionTokensDetails, PromptTokensDetails, UsageBody
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import FinishReason, TokenEvent, Usage


async def complete(handle: Handle) -> list[Completion]:
    """All choices, well ended. Raises what the engine failed with."""
    completions = await handle.complete()
    if any(each.finish_reason is FinishReason.CANCELLED for each in completions):
        raise shutting_down()
    return completions


def raise_if_failed(event: TokenEvent) -> None:
    """An ERROR or CANCELLED end, as the exception that the client is answered with."""
    if event.finish_reason is FinishReason.ERROR:
        # Many requests may end with one error object: none may grow the others' traceback.
        raise (event.error or EngineError("the engine gave no reason")).with_traceback(None)
    if event.finish_reason is FinishReason.CANCELLED:
        raise event.error or shutting_down()


def shutting_down() -> NotReady:
    """Clients that left are not answered, so a cancelled generation with a reader is the server going down."""
    return NotReady("The server is shutting down.", retry_after_s=5)


def sum_usage(usages: Sequence[Usage], prompts: int = 1) -> UsageBody:
    """OpenAI's usage: each prompt counts once, however many choices it had. `usages` are ordered by prompt."""
    per_prompt = max(1, len(usages) // prompts)
    firsts = usages[::per_prompt]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    completion = sum(usage.completion_tokens for usage in usages)
    return UsageBody(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(each.cached_tokens for each in firsts)),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
    )
