"""The loss of one micro-batch, and nothing else: hidden states -> cross-entropy of the learnt tokens, in chunks.

Logits never stand in full: only learnt places reach the head, a chunk at a time, and each chunk's gradient is formed
before the next (as in Liger-Kernel's fused linear cross-entropy). `Objective` is what Trainer trains, so that one
forward call is the whole computation and DistributedDataParallel sees it.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from onebase_training.batches import MicroBatch
from onebase_training.recompute import Recompute

CHUNK_LOGITS: Final = 1 << 24
"""Logits in a chunk: 64 MB in fp32."""


class Losses(NamedTuple):
    """`loss` carries the gradient: the weighted sum. The others are plain sums over learnt tokens."""

    loss: Tensor
    nll_sum: Tensor
    correct: Tensor


def _nothing() -> None:
    pass


class Objective(nn.Module):
    """Wraps a (PEFT) causal LM of the Llama family: `batch -> Losses`."""

    def __init__(self, model: Any, recompute: Recompute | None = None) -> None:
        super().__init__()
        self.model = model
        self.recompute = recompute
        """Not None: how many layers keep their activations is still to be found (preflight.py)."""
        self.between: Callable[[], None] = _nothing
        """Called between chunks of the head: a place to make way for others."""

    def forward(self, batch: MicroBatch) -> Losses:
        causal_lm = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = causal_lm.model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, borders=batch.borders
        ).last_hidden_state
        learnt = hidden.flatten(0, 1).index_select(0, batch.sources)
        return cross_entropy(learnt, causal_lm.lm_head.weight, batch.targets, batch.weights, self.between)


def cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, between: Callable[[], None] = _nothing
) -> Losses:
    """hidden [M, H], frozen head [V, H], targets [M], weights [M]: the loss is the sum of weight * nll."""
    sums = _ChunkedCrossEntropy.apply(hidden, head, targets, weights, between)  # type: ignore[no-untyped-call]
    loss, nll_sum, correct = sums
    return Losses(loss, nll_sum, correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """-> (sum of w * nll, sum of nll, correct)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, between: Callable[[], None]
    ) -> tuple[Tensor, ...]:
        rows = max(1, CHUNK_LOGITS // head.shape[0])
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_grad else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        nll_sum, correct = loss.clone(), loss.clone()
        for start in range(0, len(targets), rows):
            between()
            part = slice(start, start + rows)
            logits = (hidden[part] @ head.T).float()
            nll, right, gradient_logits = _row_losses(logits, targets[part], weights[part], needs_grad)
            loss += (nll * weights[part]).sum()
            nll_sum += nll.sum()
            correct += right.sum()
            if gradient is not None and gradient_logits is not None:
                gradient[part] = gradient_logits.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll_sum, correct)
        return loss, nll_sum, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None


def _row_losses(
    logits: Tensor, targets: Tensor, weights: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """nll [m], whether the best logit is the target [m], and d(sum w * nll)/d logits [m, V] (written into logits)."""
    at = torch.arange(len(targets), device=logits.device)
    best, choice = logits.max(dim=1)
    logits -= best[:, None]
    of_target = logits[at, targets].clone()
    logits.exp_()
    total = logits.sum(dim=1)
    nll = total.log() - of_target
    if not needs_grad:
        return nll, (choice == targets).float(), None
    logits *= (weights / total)[:, None]
    logits[at, targets] -= weights
    return nll, (choice == targets).float(), logits
