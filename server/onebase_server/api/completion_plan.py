"""`CompletionRequest` -> what to generate: one engine request for each prompt."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from onebase.errors import InvalidInput
from onebase_server.api.backend import Backend
from onebase_server.api.convert_sampling import (
    LONG_TEXT,
    Extras,
    answer_limit,
    check_stream_options,
    choices_of,
    to_sampling,
)
from onebase_server.api.models_lookup import ServedModel
from onebase_server.api.schemas_completions import CompletionRequest
from onebase_server.engine.types import GenerationRequest

DEFAULT_MAX_TOKENS = 16
MAX_TOTAL = 128
"""Choices of all prompts of one request: as many as one prompt may have."""


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """Requests by prompt. Choice i of the reply belongs to prompt i // n."""

    id: str
    created: int
    model: ServedModel
    requests: tuple[GenerationRequest, ...]
    echoes: tuple[str, ...]
    """Text in front of each prompt's choices: the prompt with `echo`, else ""."""
    scores_prompt: bool
    """`echo` with `logprobs`: the prompt's tokens have theirs too."""
    only_scores: bool
    """No token beyond the prompt was asked for: one is made all the same, and left out."""
    n: int
    """Choices a prompt that are returned; `best_of` of them are generated."""
    best_of: int
    wants_logprobs: bool
    include_usage: bool


def check_completion(body: CompletionRequest, max_choices: int) -> int:
    """Rules between fields; gives n. Raises InvalidInput naming the field."""
    check_stream_options(body)
    n = choices_of(body, max_choices)
    if body.suffix:
        raise unsupported("suffix", "This model can't fill in text before a suffix.")
    if body.best_of is not None and body.best_of < n:
        raise InvalidInput(
            "Invalid 'best_of': it must be at least 'n'.", param="best_of", code="integer_below_min_value"
        )
    if body.best_of is not None and body.best_of > n:
        check_best_of(body, body.best_of, max_choices)
    check_total(body, max(n, body.best_of or 1))
    return n


def check_best_of(body: CompletionRequest, best_of: int, max_choices: int) -> None:
    if body.stream:
        raise InvalidInput(
            "Invalid 'best_of': the best can't be streamed before all are there. Leave 'stream' out.",
            param="best_of",
            code="invalid_value",
        )
    if best_of > max_choices:
        raise InvalidInput(
            f"Invalid 'best_of': integer above max value. Expected a value <= {max_choices}.",
            param="best_of",
            code="integer_above_max_value",
        )


def check_total(body: CompletionRequest, each: int) -> None:
    """`each`: choices to generate for each prompt."""
    prompts = count_prompts(body.prompt)
    if prompts * each > MAX_TOTAL:
        param = "n" if body.best_of is None or body.best_of <= (body.n or 1) else "best_of"
        raise InvalidInput(
            f"Invalid '{param}': {prompts} prompts with {each} choices each are more than the {MAX_TOTAL} choices that "
            f"one request may have. Expected a value <= {MAX_TOTAL // prompts}.",
            param=param,
            code="integer_above_max_value",
        )


def count_prompts(prompt: object) -> int:
    """A list of token ids is one prompt."""
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def scores_prompt(body: CompletionRequest) -> bool:
    return bool(body.echo) and body.logprobs is not None


def unsupported(param: str, message: str) -> InvalidInput:
    return InvalidInput(message, param=param, code="unsupported_parameter")


def plan_completion(body: CompletionRequest, n: int, model: ServedModel, backend: Backend) -> CompletionPlan:
    """Tokenise and size. Raises ContextLengthExceeded, or InvalidInput for a token id that the base has not."""
    plan_id = f"cmpl-{secrets.token_hex(12)}"
    prompts = to_ids(body, backend)
    best_of = max(n, body.best_of or n)
    requests = tuple(
        GenerationRequest(
            id=f"{plan_id}-{i}" if len(prompts) > 1 else plan_id,
            prompt_ids=tuple(ids),
            sampling=to_sampling(body, _extras(body, ids, backend, ranks=best_of > n), backend.tokenizer.vocab_size),
            adapter=model.adapter,
            n=best_of,
        )
        for i, ids in enumerate(prompts)
    )
    echoes = [_echo(body.prompt, i, ids, backend) if body.echo else "" for i, ids in enumerate(prompts)]
    return CompletionPlan(
        id=plan_id,
        created=int(time.time()),
        model=model,
        requests=requests,
        echoes=tuple(echoes),
        scores_prompt=scores_prompt(body),
        only_scores=scores_prompt(body) and body.max_tokens == 0,
        n=n,
        best_of=best_of,
        wants_logprobs=body.logprobs is not None,
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
    )


async def plan_completion_aside(
    body: CompletionRequest, n: int, model: ServedModel, backend: Backend
) -> CompletionPlan:
    """As `plan_completion`, off the event loop where it takes milliseconds: other streams go on."""
    prompt = body.prompt
    size = len(prompt) if isinstance(prompt, str) else sum(1 if isinstance(each, int) else len(each) for each in prompt)
    if size > LONG_TEXT:
        return await asyncio.to_thread(plan_completion, body, n, model, backend)
    return plan_completion(body, n, model, backend)


def to_ids(body: CompletionRequest, backend: Backend) -> list[list[int]]:
    """Each prompt's ids. Text gets the base's bos, as training gives it; token ids are taken as they are."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [_encode(prompt, backend)]
    if isinstance(prompt[0], str):
        return [_encode(str(text), backend) for text in prompt]
    if isinstance(prompt[0], int):
        return [_checked(prompt, "prompt", backend)]
    return [_checked(ids, f"prompt[{i}]", backend) for i, ids in enumerate(prompt)]


def _encode(text: str, backend: Backend) -> list[int]:
    bos = backend.tokenizer.bos_id
    ids = ([] if bos is None else [bos]) + backend.tokenizer.encode(text, first=True)
    # An empty prompt on a base without bos: something must stand there to predict from.
    return ids or [backend.tokenizer.eos_id]


def _checked(ids: Sequence[object], param: str, backend: Backend) -> list[int]:
    checked = [each for each in ids if isinstance(each, int)]
    if any(each >= backend.tokenizer.vocab_size for each in checked):
        raise InvalidInput(
            f"Invalid '{param}': expected token ids below {backend.tokenizer.vocab_size}.",
            param=param,
            code="invalid_value",
        )
    return checked


def _echo(prompt: object, i: int, ids: Sequence[int], backend: Backend) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and isinstance(prompt[i], str):
        return str(prompt[i])
    return backend.tokenizer.decode(ids)


def _extras(body: CompletionRequest, ids: Sequence[int], backend: Backend, *, ranks: bool) -> Extras:
    """`ranks`: the choices will be compared by their logprobs, asked for or not."""
    asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    scores = scores_prompt(body)
    return Extras(
        max_tokens=answer_limit(max(asked, 1) if scores else asked, len(ids), backend.max_context, param="prompt"),
        prompt_logprobs=body.logprobs if scores else None,
        top_logprobs=0 if ranks and body.logprobs is None else body.logprobs,
    )
