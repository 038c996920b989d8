r"""Root-mean-square norms of Gemma's kind, which read and write their activations once on a GPU.

.. math:: y = \hat x\,(1 + w), \qquad \hat x = x\, r, \qquad r = (\mathrm{mean}(x^2) + \epsilon)^{-1/2}

transformers writes six tensors of x's size in float32 for it, in Gemma 1 to 3, Qwen3-Next, Qwen3.5 and others, and
keeps most of them; here \(\hat x\) is made again in the backward pass.

Legend: N rows, H size of the norm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from trl_nca import kernels
from trl_nca.one_pass import same_code


def is_centered_norm(kind: type[nn.Module]) -> bool:
    """Whether a class normalizes as Gemma's does, by the very same code: its weight is added to 1."""
    parts = ("forward", "_norm")
    return all(same_code(getattr(kind, part, None), getattr(Gemma3RMSNorm, part)) for part in parts)


def centered_norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of `is_centered_norm` modules. (On a CPU, and in a compiled model, it is transformers' own.)"""
    if torch.compiler.is_compiling() or not kernels.on_gpu(x):
        return type(self).forward(self, x)
    return CenteredNorm.apply(x, self.weight, self.eps)


class CenteredNorm(torch.autograd.Function):
    r"""\(\hat x\,(1 + w)\) in x's type. Keeps x.

    Args:
        x: Shape (..., H).
        weight: w. Shape (H,).
        eps: \(\epsilon\).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return kernels.run(_norm, x.flatten(0, -2), weight[None], eps).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, gradients = x.flatten(0, -2), gradient.flatten(0, -2)  # (N, H)
        d_x = kernels.run(_norm_gradient, gradients, rows, weight[None], ctx.eps).view_as(x)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (gradients * _normalized(rows, ctx.eps)[0]).sum(0).to(weight.dtype)
        return d_x, d_weight, None


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows' normalized values, shape (N, H), and their scales r, shape (N, 1), in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * scale, scale


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normalized, _ = _normalized(x, eps)
    return (normalized * (1.0 + weight.to(normalized.dtype))).to(x.dtype)


def _norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normalized, scale = _normalized(x, eps)
    by_normalized = gradient * (1.0 + weight.to(normalized.dtype))
    along = (by_normalized * normalized).mean(-1, keepdim=True)
    return ((by_normalized - normalized * along) * scale).to(x.dtype)
