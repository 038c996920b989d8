"""Keys and values of a row that is run in pieces: kept for the pieces behind, with what these send back to them.

The pieces are run in order without gradient, which fills the store, and then in reverse order with it. A piece looks at
keys of pieces before it, which are not in its graph: the gradient by them is kept in the store, and joins the graph
of the piece that they are of when its turn comes. Sums are the same, in another order: the gradient is exact.

Legend: H heads of keys, D head dimension, L tokens of the row, S tokens before a piece, n tokens of it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class KeyStore:
    """Keys and values of a row's tokens, by attention layer.

    Args:
        length: L.
    """

    def __init__(self, length: int):
        self.length = length
        # By the module, not by the number of its layer: layers that share keys may have one number.
        self._layers: dict[int, tuple[_Kept, _Kept]] = {}

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a piece, behind those of the pieces before.

        Args:
            layer: The attention that they are for, which is called once a forward, and again where it is recomputed.
            key, value: Those of the piece. Shape (1, H, n, D).
            start: S.

        Returns:
            Shape (1, H, S + n, D) each. They are the store's memory, and no copy of it.
        """
        if id(layer) not in self._layers:
            self._layers[id(layer)] = _Kept(key, self.length), _Kept(value, self.length)
        keys, values = self._layers[id(layer)]
        return _Extended.apply(key, keys, start), _Extended.apply(value, values, start)

    def tensors(self) -> list[Tensor]:
        """What the store holds."""
        kept = [tensor for pair in self._layers.values() for kept in pair for tensor in (kept.values, kept.gradients)]
        return [tensor for tensor in kept if tensor is not None]


class _Kept:
    """Keys, or values, of a layer.

    Attributes:
        values: Those of the row's tokens so far. Shape (1, L, H, D).
        gradients: What was sent back to those before the last piece, in float32 or wider. Shape (1, S, H, D).
    """

    def __init__(self, like: Tensor, length: int):
        _, heads, _, size = like.shape
        self.values = torch.empty(1, length, heads, size, dtype=like.dtype, device=like.device)
        self.gradients: Tensor | None = None

    def send_back(self, gradient: Tensor, start: int) -> Tensor:
        """Keeps the gradient by what is before a piece; returns that by its own, of shape (1, n, H, D), in full.

        Args:
            gradient: By all that the piece looked at. Shape (1, S + n, H, D).
            start: S.
        """
        stop, own = gradient.shape[1], gradient[:, start:]
        if self.gradients is None:  # the last piece, which is run first
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self.gradients = torch.zeros(1, start, *gradient.shape[2:], dtype=wide, device=gradient.device)
        else:
            own = (own + self.gradients[:, start:stop]).to(gradient.dtype)
        self.gradients[:, :start] += gradient[:, :start]
        return own


class _Extended(torch.autograd.Function):
    """`KeyStore.extend` of one tensor."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, kept: _Kept, start: int) -> Tensor:
        stop = start + own.shape[2]
        kept.values[:, start:stop] = own.transpose(1, 2)  # the same again, where a piece is run again
        ctx.kept, ctx.start = kept, start
        return kept.values[:, :stop].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kept.send_back(gradient.transpose(1, 2), ctx.start).transpose(1, 2), None, None
