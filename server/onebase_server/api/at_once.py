"""How many sequences one call may ask for: a call for more than there can ever be is helped by no waiting."""

from collections.abc import Sequence

from onebase.errors import InvalidInput
from onebase_server.api.caller import Caller
from onebase_server.engine.types import GenerationRequest


def sequences_of(wanted: Sequence[GenerationRequest]) -> int:
    return sum(each.n for each in wanted)


def prompt_tokens_of(wanted: Sequence[GenerationRequest]) -> int:
    """Each prompt counts once, however many choices it has."""
    return sum(len(each.prompt_ids) for each in wanted)


def check_at_once(wanted: Sequence[GenerationRequest], limit: int) -> None:
    """More than the server's queue takes even when it is empty: no 429, which clients retry. Raises InvalidInput."""
    sequences = sequences_of(wanted)
    if sequences > limit:
        raise InvalidInput(
            f"This request asks for {sequences} sequences and this server takes {limit} at a time: ask for fewer "
            "choices ('n', 'best_of') or send fewer prompts in one request.",
            param="prompt" if len(wanted) > 1 else "n",
            code="invalid_value",
        )


def check_parallel(caller: Caller, wanted: Sequence[GenerationRequest]) -> None:
    """As `check_at_once`, for more than the key may ever have."""
    limit, sequences = caller.limits.parallel, sequences_of(wanted)
    if limit is not None and sequences > limit:
        raise InvalidInput(
            f"This request asks for {sequences} sequences and this key may have {limit} at a time: ask for fewer "
            "choices ('n', 'best_of') or send fewer prompts in one request.",
            param="prompt" if len(wanted) > 1 else "n",
            code="parallel_limit_exceeded",
        )
