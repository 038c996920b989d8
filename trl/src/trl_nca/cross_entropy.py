r"""Cross-entropy of logits with its gradient, in as few passes over the logits as the device allows.

Legend: n tokens, V vocabulary, p probabilities, t the target.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_nca import kernels

Loss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    r""":math:`-\log p_t` and its gradient by the logits, p less 1 at t. Both are rounded once, at the end.

    Args:
        logits: Shape (n, V).
        targets: Token ids. Shape (n,).
        needs_gradient: Whether the gradient is made.

    Returns:
        The losses in float32 or wider, shape (n,), and the gradient in the logits' type, shape (n, V), or nothing.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits, dim=-1, dtype=wide)  # (n, V)
    at_target = targets[:, None]
    loss = -log_probs.gather(1, at_target)  # (n, 1)
    if not needs_gradient:
        return loss.squeeze(1), logits.new_empty(0)
    # On a CPU casting comes last: within an exp it is slower, and so is setting numbers of two bytes.
    in_place = wide == logits.dtype or logits.device.type == "cpu"
    gradient = torch.exp(log_probs, out=log_probs if in_place else torch.empty_like(logits))
    gradient.scatter_(1, at_target, torch.expm1(-loss).to(gradient.dtype))
    return loss.squeeze(1), gradient.to(logits.dtype)


@torch.library.custom_op("trl_nca::cross_entropy", mutates_args=())
def fused_cross_entropy(logits: Tensor, targets: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """`cross_entropy` for GPUs, compiled: logits are read and gradients written, and nothing of their size between.

    An operation of its own, because a plan runs no kernels and is to count what these hold.
    """
    return kernels.run(cross_entropy, logits, targets, needs_gradient)


@fused_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    loss = torch.empty_like(targets, dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, torch.empty_like(logits) if needs_gradient else logits.new_empty(0)


class CrossEntropy(torch.autograd.Function):
    """Losses, shape (n,), of logits, shape (n, V), whose gradient is made with them and kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        losses, gradient = loss(logits.detach(), targets, True)  # without: the compiler asks for its .grad, and warns
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (by_logits,) = ctx.saved_tensors
        return by_logits.mul_(gradient[:, None]), None, None
