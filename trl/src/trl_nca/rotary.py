"""Rotary positions whose factors depend on the length of the row: dynamic NTK and LongRoPE.

transformers takes the longest position of a forward for that length. So a row's log-prob would depend on the rows
beside it, and with dynamic NTK on those of earlier forwards. Here each row has the factors of its own length.
"""

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def length_dependent(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model that choose their factors by the length; of most models there are none."""
    return [module for module in model.modules() if _lengths(module)]


def longest_shared(embeddings: Sequence[nn.Module]) -> int:
    """Tokens up to which the rotation of `length_dependent` embeddings does not depend on a row's length."""
    return min((length for module in embeddings for _, length in _lengths(module).values()), default=sys.maxsize)


@contextmanager
def rotating_by_row(embeddings: Sequence[nn.Module]) -> Iterator[None]:
    """Gives each row of a forward the factors of its own length, which is that of the row with its last target."""
    for module in embeddings:
        module.forward = types.MethodType(_rotate_by_row, module)
    try:
        yield
    finally:
        for module in embeddings:
            del module.forward
        forget_lengths(embeddings)


def _rotate_by_row(
    self: nn.Module, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    parts = []
    for row in position_ids[:, None]:
        forget_lengths([self])
        whole = torch.cat([row, row.amax(dim=1, keepdim=True) + 1], dim=1)
        parts.append([part[:, :-1] for part in type(self).forward(self, x[:1], whole, *args, **kwargs)])
    cos, sin = zip(*parts, strict=True)
    return torch.cat(cos), torch.cat(sin)


def forget_lengths(embeddings: Sequence[nn.Module]) -> None:
    """Dynamic NTK keeps the factors of the longest row so far, also for a shorter one that comes after it: no more."""
    for module, layer_type, kind, length in [(m, t, *found) for m in embeddings for t, found in _lengths(m).items()]:
        prefix = f"{layer_type}_" if layer_type else ""
        if kind == "dynamic" and getattr(module, f"{prefix}max_seq_len_cached", length) != length:
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, f"{prefix}original_inv_freq").to(device, copy=True)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", length)


def _lengths(module: nn.Module) -> dict[str, tuple[str, int]]:
    """Kind of the rotation, and the length from which its factors change, by layer type ("": all are alike).

    Empty for other modules.
    """
    kinds = getattr(module, "rope_type", None)
    if not kinds:
        return {}
    parameters = module.config.rope_parameters
    found = {}
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
        if kind == "longrope":
            found[layer_type] = kind, parameters.get(layer_type, parameters)["original_max_position_embeddings"]
        elif "dynamic" in kind:
            found[layer_type] = "dynamic", module.original_max_seq_len
    return found
