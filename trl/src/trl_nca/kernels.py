"""Functions that treat each row of their tensors by itself as one kernel each, by torch.compile, on a GPU."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Numbers in a tensor from which on a kernel is worth its call, which costs the CPU more than two operations do.
_LARGE = 2**22
_failed: set[Callable[..., Any]] = set()  # functions that could not be compiled
_checked: set[tuple[Any, ...]] = set()  # compiled functions, and their settings, whose first results were right


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can run where a tensor is."""
    return x.is_cuda


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of rows: for large tensors as one kernel on a GPU, if it can be compiled there.

    Only the first size of its tensors changes, and that is compiled once for all.
    """
    if on_gpu(args[0]) and args[0].numel() >= _LARGE and function not in _failed:
        try:
            return _run_compiled(function, args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, a GPU that it does not know
            _give_up(function, error)
    return function(*args)


def _run_compiled(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    # Detached: it would be compiled once for the policy and once for the reference, which has no gradient.
    args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    for tensor in filter(torch.is_tensor, args):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.mark_static(tensor, list(range(1, tensor.dim())))
    with torch.autocast(args[0].device.type, enabled=False):  # and once in and once outside of it
        result = _compiled(function)(*args)
        settings = tuple(arg for arg in args if not isinstance(arg, Tensor))
        if (function, *settings) not in _checked:
            _check(function, args, result)
            _checked.add((function, *settings))
    return result


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # A row in one piece, however many there are at first: else torch sums it up in passes of their own.
    return torch.compile(function, options={"split_reductions": False})


def _check(function: Callable[..., Any], args: Sequence[Any], result: Any) -> None:
    """Holds the first rows of a compiled function's result against the function itself."""
    expected = function(*(arg[:64] if isinstance(arg, Tensor) else arg for arg in args))
    for ours, exact in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        distance = (ours[:64].float() - exact.float()).norm()
        # A NaN of ours is one too many, unless the function gives it too, of a model that has gone wrong.
        if not distance <= 0.01 * exact.float().norm() and exact.isfinite().all():
            raise ValueError("what was compiled gives other numbers")


def _give_up(function: Callable[..., Any], error: Exception) -> None:
    _failed.add(function)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(
        f"{function.__name__.strip('_')} is not compiled, and steps take longer and more memory: {reason}", stacklevel=2
    )
