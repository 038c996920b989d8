"""Where an optimizer step waits for the device, instead of running ahead of it.

On a GPU torch says so itself. On a CPU there is nothing to wait for: there a GPU is played, by tensors that say they
are on another device, hold their numbers on the CPU, and note whenever these must be known on the other side.
"""

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: The device that is played: one that autograd knows, that no library looks for, and that has no kernels to run by.
PLAYED = torch.device("meta")
#: Operations whose result, or its size, the CPU must know.
_READS = (
    "_local_scalar_dense nonzero masked_select equal _unique _unique2 unique_dim unique_consecutive bincount"
).split()
#: What torch's warning begins with.
_WARNING = "called a synchronizing CUDA operation"
#: Random numbers are drawn on the CPU.
_RANDOM = SimpleNamespace(
    get_rng_state=lambda device: torch.get_rng_state(), set_rng_state=lambda state, device: torch.set_rng_state(state)
)
_ROOT, _PACKAGES = Path(__file__).resolve().parent.parent, f"{Path(torch.__file__).parent.parent}/"


def waits_by_step(trainer: Any) -> list[Counter[str]]:
    """Trains, on a GPU or on one that is played, and says where each optimizer step waited, and how often.

    A step begins where its batches are fetched, and ends with what is logged of it.

    Args:
        trainer: A Trainer that has not trained yet.
    """
    steps: list[Counter[str]] = []
    get_batch_samples = trainer.get_batch_samples
    with watch(trainer.args.device.type) as places, contextlib.ExitStack() as stack:

        def end_step() -> None:
            steps.append(Counter(places))
            places.clear()

        def begin_step(*args: Any) -> Any:
            end_step()
            return get_batch_samples(*args)

        if trainer.args.device.type == "cpu":
            stack.enter_context(_played_on(trainer))
        stack.enter_context(patch.object(trainer, "get_batch_samples", begin_step))
        finish = trainer._finalize_training  # once: it is no step's
        stack.enter_context(patch.object(trainer, "_finalize_training", lambda *args: (end_step(), finish(*args))[1]))
        trainer.train()
    return steps[1:]


@contextlib.contextmanager
def watch(device: str) -> Iterator[list[str]]:
    """A context that lists where Python waits for the device: a place for each time, innermost call first.

    Args:
        device: "cuda", where torch sees all but what the driver or NCCL waits for by itself. Or "cpu": then what is on
            `PLAYED`, or brought there in the context, counts as on a GPU.
    """
    places: list[str] = []
    if device == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # each time, not once a line
            warnings.showwarning = partial(_note, places, warnings.showwarning)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode(before)
    else:
        with _PlayedGPU(places):
            yield places


def _note(places: list[str], show: Any, message: Warning | str, *args: Any, **kwargs: Any) -> None:
    if str(message).startswith(_WARNING):
        places.append(_place())
    else:
        show(message, *args, **kwargs)


def _place() -> str:
    """The call that waits, and where in this project it was made, without torch's own lines."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    outside = [f for f in frames if not f.f_code.co_filename.startswith((f"{_PACKAGES}torch/", __file__, "<"))]
    ours = [f for f in outside if Path(f.f_code.co_filename).is_relative_to(_ROOT) and _PACKAGES not in _file(f)]
    return " < ".join(dict.fromkeys(map(_line, [*outside[:1], *ours[:1]])))


def _file(frame: Any) -> str:
    return frame.f_code.co_filename


def _line(frame: Any) -> str:
    file = _file(frame).removeprefix(_PACKAGES).removeprefix(f"{_ROOT}/")
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


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


class _PlayedGPU(TorchDispatchMode):
    """Runs what is on `PLAYED` on the CPU, and notes the places at which a GPU's numbers would be waited for."""

    def __init__(self, places: list[str]):
        super().__init__()
        self.places = places
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "_PlayedGPU":
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
            self.places.append(f"{func.overloadpacket.__name__} at {_place()}")
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


@contextlib.contextmanager
def _played_on(trainer: Any) -> Iterator[None]:
    """The trainer, its models and its batches are on `PLAYED`."""
    with (
        patch.dict(PartialState._shared_state, device=PLAYED),
        patch.dict(trainer.accelerator.state.__dict__, device=PLAYED),
        patch.object(type(trainer.args), "device", PLAYED),
    ):
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.to(PLAYED)
        yield
