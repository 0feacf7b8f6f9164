"""Sampled tokens -> text -> events in each request's channel. Knows no device and no schedule."""

from collections.abc import Callable

from onebase_server.engine.batch import StepPlan
from onebase_server.engine.handle import Waiter, wake
from onebase_server.engine.runner import StepResult
from onebase_server.engine.sequence import Sequence
from onebase_server.engine.types import FinishReason, TokenEvent, TokenLogprob, Usage


class Emitter:
    """Pushes events; `on_close` hears of every sequence whose last event has been pushed."""

    def __init__(self, on_close: Callable[[Sequence], None]) -> None:
        self._on_close = on_close

    def emit(self, plan: StepPlan, result: StepResult) -> None:
        """Events of one step."""
        waiters: list[Waiter] = []
        for row, (sequence, token) in enumerate(zip(plan.sampling, result.token_ids.tolist(), strict=True)):
            if sequence.is_closed:
                continue
            detokenizer, sampling = sequence.detokenizer, sequence.row.sampling
            if sequence.finish is not FinishReason.STOP:
                logprob = None if sampling.top_logprobs is None else _logprob(result, row, token)
                check = len(sequence.row.output_ids) > sampling.min_tokens
                check = check and (sequence.matcher is None or sequence.matcher.heeds_stops)
                if detokenizer.push(token, logprob, check_stops=check):
                    sequence.finish = FinishReason.STOP
                elif sequence.finish is not None:
                    detokenizer.flush()
            else:
                detokenizer.flush()
            waiter = self._push(sequence, sequence.finish, None)
            if waiter is not None:
                waiters.append(waiter)
        if waiters:
            wake(waiters)

    def close(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """The last event of a sequence that ends outside a step. What was held as a possible stop string stays back."""
        sequence.finish = reason
        waiter = self._push(sequence, reason, error)
        if waiter is not None:
            wake([waiter])

    def _push(self, sequence: Sequence, finish: FinishReason | None, error: Exception | None) -> Waiter | None:
        text, token_ids, logprobs = sequence.detokenizer.take()
        scores = self._prompt_logprobs(sequence)
        if finish is None:
            if not token_ids and not text and not scores:
                return None
            event = TokenEvent(sequence.index, text, token_ids, logprobs, prompt_logprobs=scores)
            return sequence.group.handle.push(event)
        usage = Usage(
            prompt_tokens=len(sequence.row.prompt_ids),
            completion_tokens=len(sequence.row.output_ids),
            cached_tokens=sequence.cached_tokens or 0,
        )
        event = TokenEvent(sequence.index, text, token_ids, logprobs, finish, usage, error, scores)
        waiter = sequence.group.handle.push(event)
        sequence.is_closed = True
        self._on_close(sequence)
        return waiter

    @staticmethod
    def _prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprob, ...]:
        """With a choice's first event only."""
        if sequence.row.sampling.prompt_logprobs is None or sequence.has_told_prompt:
            return ()
        sequence.has_told_prompt = True
        return tuple(sequence.group.prompt_logprobs)


def _logprob(result: StepResult, row: int, token: int) -> TokenLogprob:
    ids, values = result.top_ids[row], result.top_logprobs[row]
    top = () if ids is None or values is None else tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(result.logprobs[row]), top)
