r"""Gated feed-forward layers and rotary positions that read and write their activations once.

transformers writes \(\mathrm{act}(g)\), the product with u, and up to four more tensors of the queries' size for a
rotation; autograd writes as many again, and keeps act(g). Here each is a function with a backward pass of its own, and
`kernels` makes both passes one kernel each on a GPU. What is not kept is made again. The numbers are transformers'
but for rounding.

Legend: N tokens, H heads, D head dimension, F width of the feed-forward layer.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb, rotate_half

from trl_nca import kernels

#: An activation, and its gradient with respect to its input, of the output's gradient and the input.
Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
_SILU: Activation = (silu, torch.ops.aten.silu_backward)
_GELU_TANH: Activation = (
    functools.partial(gelu, approximate="tanh"),
    functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
)
_ACTIVATIONS: dict[type, Activation] = {nn.SiLU: _SILU, SiLUActivation: _SILU, GELUTanh: _GELU_TANH}
_ROTATION = apply_rotary_pos_emb.__name__


def fuse_passes(module: nn.Module) -> None:
    """Gives a module the forward of one pass, if it is a gated feed-forward layer or attention of Llama's kind.

    A module whose forward was replaced by another keeps that.
    """
    if "forward" in vars(module):
        return
    if is_gated(module):
        module.forward = types.MethodType(gated_forward, module)
    elif rotates(type(module)):
        module.forward = types.MethodType(rotating_forward, module)


def is_gated(module: nn.Module) -> bool:
    """Whether a module computes `down(act(gate(x)) * up(x))` by Llama's code, act being known here."""
    gated = same_code(getattr(type(module), "forward", None), LlamaMLP.forward)
    return gated and type(module.act_fn) in _ACTIVATIONS


def rotates(kind: type[nn.Module]) -> bool:
    """Whether a class of attention rotates queries and keys by a function with Llama's very own code."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType) or _ROTATION not in forward.__code__.co_names:
        return False
    rotation = forward.__globals__.get(_ROTATION)
    turns = getattr(rotation, "__globals__", {}).get(rotate_half.__name__)
    return same_code(rotation, apply_rotary_pos_emb) and same_code(turns, rotate_half)


def same_code(function: Any, other: Callable[..., Any]) -> bool:
    """Whether a function has the very same code as another, which many families repeat. (Its docstring may differ.)"""

    def parts(f: Any) -> tuple[Any, ...]:
        code = f.__code__
        return code.co_code, code.co_names, [c for c in code.co_consts if c != f.__doc__]

    return hasattr(function, "__code__") and parts(function) == parts(other)


def gated_forward(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of `is_gated` modules."""
    if not _is_worth_it(x.shape[-2]):
        return type(self).forward(self, x)
    gate, up = self.gate_proj(x), self.up_proj(x)
    if gate.dtype != up.dtype:
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(Gate.apply(gate, up, _ACTIVATIONS[type(self.act_fn)]))


def rotating_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of attention that `rotates`."""
    forward = type(self).forward
    if not torch.compiler.is_compiling():  # which would look for the copy's globals in the module
        forward = with_rotation(forward, rotate)
    return forward(self, *args, **kwargs)


@functools.cache
def with_rotation(forward: types.FunctionType, rotation: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of an attention's forward that rotates by another function, which its module's globals know nothing of."""
    scope = {**forward.__globals__, _ROTATION: rotation}
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`, on a GPU in one pass where it can be. Under autocast the result has its type.

    Args:
        query, key: Shape (B, H, L, D), each with its own number of heads.
        cos, sin: Shape (B, L, D) or (1, L, D), without gradient.
        unsqueeze_dim: Where cos and sin get the axis of the heads.
    """
    if unsqueeze_dim != 1 or not _rotates_whole(query, key, cos):
        return apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim)
    dtype = rotated_type(query, cos)
    if not _is_worth_it(query.shape[2]):
        query, key = (t.to(dtype) for t in apply_rotary_pos_emb(query, key, cos, sin))  # a cache has one type
        return query, key
    batch, _, length, size = query.shape
    cos, sin = (t.expand(batch, length, size).flatten(0, 1) for t in (cos, sin))  # (N, D)
    rows = (t.transpose(1, 2).flatten(0, 1) for t in (query, key))  # (N, H, D)
    turned = Rotation.apply(*rows, cos, sin, dtype)
    query, key = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in turned)
    return query, key


def rotated_type(x: Tensor, cos: Tensor) -> torch.dtype:
    """Autocast's, which attention would cast to, else the one that transformers gives."""
    dtype, device = torch.promote_types(x.dtype, cos.dtype), x.device.type
    casts = torch.is_autocast_enabled(device) and dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else dtype


def _rotates_whole(query: Tensor, key: Tensor, cos: Tensor) -> bool:
    """Whether it is as in all of Llama's kind. (On a CPU transformers' operations were the faster ones.)"""
    same_type, same_size = query.dtype == key.dtype, query.shape[-1] == key.shape[-1] == cos.shape[-1]
    is_fixed = cos.dim() == 3 and not cos.requires_grad
    return kernels.on_gpu(query) and query.dim() == 4 and same_type and same_size and is_fixed


def _is_worth_it(length: int) -> bool:
    """Not for a token at a time, as in sampling with a cache, and not in a compiled model, which does it itself."""
    return not torch.compiler.is_compiling() and length > 1


class Gate(torch.autograd.Function):
    r"""\(\mathrm{act}(g) \cdot u\). Keeps g and u.

    Args:
        gate, up: g and u, of one type. Shape (..., F).
        activation: act and its gradient.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return kernels.run(_gate, gate.flatten(0, -2), up.flatten(0, -2), activation[0]).view_as(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shape = gradient.shape
        rows = (t.flatten(0, -2) for t in (gradient, *ctx.saved_tensors))  # (N, F)
        d_gate, d_up = kernels.run(_gate_gradients, *rows, *ctx.activation)
        return d_gate.view(shape), d_up.view(shape), None


class Rotation(torch.autograd.Function):
    """Queries and keys rotated by their positions. Keeps cos and sin, which all layers share.

    Args:
        query, key: Shape (N, H, D), each with its own number of heads.
        cos, sin: Shape (N, D). Their halves need not agree.
        dtype: Type of the result.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = query.dtype
        return kernels.run(_rotate, query, key, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
        return *kernels.run(_rotate_back, d_query, d_key, *ctx.saved_tensors, ctx.dtype), None, None, None


def _gate(gate: Tensor, up: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
    return activate(gate) * up


def _gate_gradients(
    gradient: Tensor,
    gate: Tensor,
    up: Tensor,
    activate: Callable[[Tensor], Tensor],
    differentiate: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    return differentiate(gradient * up, gate), gradient * activate(gate)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The head's halves a and b, with the two halves of cos and sin, become a cos - b sin and b cos + a sin."""
    cos, sin = _halves(cos[:, None]), _halves(sin[:, None])  # (N, 1, 2, D / 2)
    signed = sin * _signs(sin)

    def turn(x: Tensor) -> Tensor:
        x = _halves(x)
        return (x * cos + x.flip(-2) * signed).flatten(-2).to(dtype)

    return turn(query), turn(key)


def _rotate_back(d_query: Tensor, d_key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The transpose of `_rotate`: the inverse where the halves of cos and sin agree."""
    cos, sin = _halves(cos[:, None]), _halves(sin[:, None])
    signs = _signs(sin)

    def turn(gradient: Tensor) -> Tensor:
        gradient = _halves(gradient)
        return (gradient * cos - (gradient * sin).flip(-2) * signs).flatten(-2).to(dtype)

    return turn(d_query), turn(d_key)


def _halves(x: Tensor) -> Tensor:
    """(..., D) as (..., 2, D / 2). Swapping these is an index; joining two parts again would be kernels of its own."""
    return x.unflatten(-1, (2, -1))


def _signs(like: Tensor) -> Tensor:
    """-1 of the first half and 1 of the second, made where it is used. Shape (2, 1)."""
    return torch.arange(-1, 2, 2, device=like.device)[:, None]
