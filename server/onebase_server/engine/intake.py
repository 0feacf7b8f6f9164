"""From a request to its sequences, on the caller's thread: checks, limits, seeds, page keys.

What can be refused is refused here, before anything is queued.
"""

import secrets

from onebase.errors import ContextLengthExceeded, InvalidInput
from onebase_server.engine.detokenizer import Detokenizer, TokenTable
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.prefix_cache import PageKey, extend_keys, root_key
from onebase_server.engine.runner import RunnerLimits, SampleRow
from onebase_server.engine.sequence import RequestGroup, Sequence, SequenceStatus, resolve_seed
from onebase_server.engine.types import GenerationRequest


def context_limit(limits: RunnerLimits) -> int:
    """Tokens of one sequence that the model and the pages can hold."""
    return min(limits.max_context, limits.num_pages * limits.page_size)


def check_request(request: GenerationRequest, limits: RunnerLimits) -> None:
    """Raises ContextLengthExceeded or InvalidInput."""
    if not request.prompt_ids:
        raise InvalidInput("the prompt has no tokens", param="prompt")
    if len(request.prompt_ids) + 1 > context_limit(limits):
        raise ContextLengthExceeded(context_limit(limits), len(request.prompt_ids))
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= limits.vocab_size:
        raise InvalidInput(f"token ids must be in 0..{limits.vocab_size - 1}", param="prompt")
    if request.n < 1:
        raise InvalidInput("n must be at least 1", param="n")
    if request.sampling.max_tokens < 1:
        raise InvalidInput("max_tokens must be at least 1", param="max_tokens")


def make_group(
    request: GenerationRequest,
    handle: RequestHandle,
    limits: RunnerLimits,
    table: TokenTable,
    now: float,
    arrival: int,
    *,
    share_prefixes: bool,
) -> RequestGroup:
    """The request's sequences; all but the first follow the first. `request` has been checked."""
    sampling = request.sampling
    digest = None if request.adapter is None else request.adapter.digest
    root = root_key(digest, None if share_prefixes else request.owner)
    keys: list[PageKey] = []
    extend_keys(keys, root, request.prompt_ids, limits.page_size)
    stop_ids = sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids | limits.eos_token_ids
    max_tokens = min(sampling.max_tokens, context_limit(limits) - len(request.prompt_ids))
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    group = RequestGroup(request, handle, root, submitted_at=now, num_open=request.n)
    for index in range(request.n):
        sequence = Sequence(
            group=group,
            index=index,
            row=SampleRow(-1, sampling, resolve_seed(seed, index), request.prompt_ids),
            ids=list(request.prompt_ids),
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            detokenizer=Detokenizer(table, sampling.stop),
            keys=list(keys),
            order=(request.priority, arrival, index),
            status=SequenceStatus.FOLLOWING if index else SequenceStatus.NEW,
        )
        group.sequences.append(sequence)
    group.followers = group.sequences[1:]
    return group
