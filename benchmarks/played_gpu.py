"""A GPU that is played on a CPU: what runs there, and when a CPU would have to wait for it.

Its tensors say they are on another device and hold their numbers on the CPU, where all operations run. So a whole
training run can be watched for what it would ask of a GPU, and gives the same numbers.
"""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: The device that is played: one that autograd knows, that no library looks for, and that has no kernels to run by.
PLAYED = torch.device("meta")
#: Operations whose result, or its size, the CPU must know.
_READS = (
    "_local_scalar_dense nonzero masked_select equal _unique _unique2 unique_dim unique_consecutive bincount"
).split()
#: Random numbers are drawn on the CPU.
_RANDOM = SimpleNamespace(
    get_rng_state=lambda device: torch.get_rng_state(), set_rng_state=lambda state, device: torch.set_rng_state(state)
)


class _OnDevice(Tensor):
    """A tensor that says it is on `PLAYED`, and holds its numbers on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "_OnDevice":
        return Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=PLAYED
        )

    def __init__(self, held: Tensor):
        self.held = held

    def tolist(self) -> Any:  # torch refuses it of a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PlayedGPU(TorchDispatchMode):
    """Runs on the CPU what is on `PLAYED`, or is brought there.

    Args:
        note: Called where a GPU would be waited for, with the name of the operation.
    """

    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "PlayedGPU":
        # What torch asks of a device by its name, in Python or before any operation is dispatched.
        autocast, enabled, tensor = torch.autocast, torch.is_autocast_enabled, torch.tensor
        for name, played in {
            "autocast": lambda d, *a, **k: contextlib.nullcontext() if d == PLAYED.type else autocast(d, *a, **k),
            "is_autocast_enabled": lambda d=None: d != PLAYED.type and enabled(d or "cuda"),
            "tensor": lambda data, *, device=None, **k: tensor(data, **k).to(device),
            PLAYED.type: _RANDOM,
        }.items():
            self._patches.enter_context(patch.object(torch, name, played, create=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.note(func.overloadpacket.__name__)
        return _run(func, args, kwargs)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a GPU would have to be done with all it was told to do."""
    name, read = func.overloadpacket.__name__, []
    _each(read.append, (args, kwargs))
    on_device = [isinstance(tensor, _OnDevice) for tensor in read]
    if name in ("_to_copy", "copy_"):  # also to a GPU: torch waits for the copy, unless it is told not to
        to_device = on_device[0] if name == "copy_" else kwargs.get("device", read[0].device) == PLAYED
        return to_device != on_device[-1] and not (kwargs.get("non_blocking") or args[2:] == (True,))
    if name in ("index", "index_put_", "index_put"):
        return any(on_device) and any(i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None)
    unsized = func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    return any(on_device) and (name in _READS or unsized)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation returns: on `PLAYED`, if it is told to be there, or if what it reads is."""
    known: dict[int, Tensor] = {}  # what is written in place stays the tensor that it was

    def held(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, _OnDevice):
            return tensor
        known[id(tensor.held)] = tensor
        return tensor.held

    args, kwargs = _each(held, (args, kwargs))
    device = kwargs.get("device")
    out = func(*args, **kwargs | ({"device": torch.device("cpu")} if device else {}))
    if (device or (PLAYED if known else None)) != PLAYED:
        return out
    return _each(lambda tensor: known[id(tensor)] if id(tensor) in known else _OnDevice(tensor), out)


def _each(function: Any, value: Any) -> Any:
    """The arguments or results of an operation, with a function applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _each(function, v) for key, v in value.items()}
    return type(value)([_each(function, v) for v in value]) if isinstance(value, (list, tuple)) else value
