r"""Cross-entropy of logits, with its gradient and what is logged of them, in as few passes as the device allows.

Legend: n tokens, V vocabulary, p probabilities, t the target.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_nca import kernels

#: Numbers that a CPU takes at a time, whole rows of them: what is made of these on the way does not leave its cache.
_CACHED = 2**17


def cross_entropy(
    logits: Tensor, targets: Tensor, needs_gradient: bool, needs_statistics: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`-\log p_t`, its gradient by the logits, p less 1 at t, and statistics of p. All are rounded once.

    Args:
        logits: Shape (n, V).
        targets: Token ids. Shape (n,).
        needs_gradient: Whether the gradient is made.
        needs_statistics: Whether the statistics are.

    Returns:
        The losses in float32 or wider, shape (n,); the gradient in the logits' type, shape (n, V), or nothing; and in
        the losses' type the entropy of p in nats (log V, where all tokens are as likely) and 1 where none is likelier
        than the target, else 0, shape (n, 2), or nothing.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits, dim=-1, dtype=wide)  # (n, V)
    at_target = targets[:, None]
    loss = -log_probs.gather(1, at_target)  # (n, 1)
    gradient, statistics = logits.new_empty(0), loss.new_empty(0, 2)
    if needs_gradient or needs_statistics:
        probs = torch.exp(log_probs)
    if needs_statistics:
        finite = log_probs.clamp_(min=torch.finfo(wide).min)  # a token ruled out adds 0 to the sum, not 0 times -inf
        is_top = logits.gather(1, at_target).squeeze(1) == logits.amax(dim=-1)
        statistics = torch.stack([-finite.mul_(probs).sum(dim=-1), is_top.to(wide)], dim=1)
    if needs_gradient:
        gradient = probs.to(logits.dtype)  # before a number is set, for which a compiler writes all: no wider than this
        gradient.scatter_(1, at_target, torch.expm1(-loss).to(logits.dtype))
    return loss.squeeze(1), gradient, statistics


@torch.library.custom_op("trl_nca::cross_entropy", mutates_args=())
def fused_cross_entropy(
    logits: Tensor, targets: Tensor, needs_gradient: bool, needs_statistics: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy`, of whose logits and gradients each is read or written once, and nothing of their size between.

    On a GPU it is compiled; a CPU takes a few rows at a time. It is an operation of its own, because a plan runs
    neither, and is to count what these hold.
    """
    if kernels.on_gpu(logits):
        return kernels.run(cross_entropy, logits, targets, needs_gradient, needs_statistics)
    results, rows = _results(logits, targets, needs_gradient, needs_statistics), max(1, _CACHED // logits.shape[1])
    for at in range(0, len(logits), rows):
        part = slice(at, at + rows)
        found = cross_entropy(logits[part], targets[part], needs_gradient, needs_statistics)
        for result, of_part in zip(results, found, strict=True):
            result[part] = of_part
    return results


@fused_cross_entropy.register_fake
def _results(
    logits: Tensor, targets: Tensor, needs_gradient: bool, needs_statistics: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fused_cross_entropy` returns, without its numbers."""
    loss = torch.empty_like(targets, dtype=torch.promote_types(logits.dtype, torch.float32))
    gradient = torch.empty_like(logits) if needs_gradient else logits.new_empty(0)
    return loss, gradient, loss.new_empty(len(targets) if needs_statistics else 0, 2)


class CrossEntropy(torch.autograd.Function):
    """Losses, shape (n,), of logits, shape (n, V), whose gradient is made with them and kept; and their statistics."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, needs_statistics: bool) -> tuple[Tensor, Tensor]:
        # Detached: else the compiler asks for its .grad, and warns.
        losses, gradient, statistics = fused_cross_entropy(logits.detach(), targets, True, needs_statistics)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(statistics)
        return losses, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (by_logits,) = ctx.saved_tensors
        return by_logits.mul_(gradient[:, None]), None, None
