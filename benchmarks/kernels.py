"""The compiled kernels of a step at Mistral-7B's and Gemma-3's sizes, against the same functions in float32."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from trl_nca import kernels, norms, one_pass
from trl_nca.cross_entropy import cross_entropy

#: Tokens, of a small machine and of a GPU.
TOKENS = 16, 4096


def compare_kernels(tiny: bool, device: str) -> dict[str, Any]:
    """Of each function how far its bf16 results are from float32's: compiled, and plain.

    Args:
        tiny: At a small size.
        device: "cuda", or "cpu", where nothing is compiled.

    Returns:
        `compiled`: whether all were; by function `distance` and `plain_distance`, relative to the norm, the largest of
        its results, and `first_call_seconds`, compiling included.
    """
    found: dict[str, Any] = {}
    for name, (function, args) in _cases(TOKENS[not tiny], 64 if tiny else 4096, device).items():
        exact = function(*tree_map_only((Tensor, torch.dtype), _wide, args))
        started = time.perf_counter()
        ours = kernels.run(function, *args)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        distances = {"distance": _distance(ours, exact), "plain_distance": _distance(function(*args), exact)}
        found[name] = distances | {"first_call_seconds": seconds}
    return {"compiled": bool(kernels._checked) and not kernels._failed} | found


def _cases(tokens: int, size: int, device: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """By name a function and its arguments."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    wide, head = 4 * size, min(size, 128)
    queries, keys, angles = (tokens, size // head, head), (tokens, max(size // head // 4, 1), head), (tokens, head)
    turned = (draw(*queries), draw(*keys), draw(*angles), draw(*angles), torch.bfloat16)
    silu = one_pass._SILU
    logits, targets = 4 * draw(tokens // 8, 32 * size), torch.randint(0, 32 * size, (tokens // 8,), device=device)
    return {
        "cross-entropy": (cross_entropy, (logits, targets, True, True)),
        "gate": (one_pass._gate, (draw(tokens, wide), draw(tokens, wide), silu[0])),
        "gate, gradient": (one_pass._gate_gradients, (*(draw(tokens, wide) for _ in range(3)), *silu)),
        "rotation": (one_pass._rotate, turned),
        "rotation, gradient": (one_pass._rotate_back, turned),
        "norm": (norms._norm, (draw(tokens, size), draw(1, size), 1e-6)),
        "norm, gradient": (norms._norm_gradient, (draw(tokens, size), draw(tokens, size), draw(1, size), 1e-6)),
    }  # fmt: skip


def _wide(value: Tensor | torch.dtype) -> Tensor | torch.dtype:
    if isinstance(value, torch.dtype):
        return torch.float32
    return value.float() if value.is_floating_point() else value


def _distance(found: Any, exact: Any) -> float:
    pairs = zip(tree_leaves(found), tree_leaves(exact), strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
