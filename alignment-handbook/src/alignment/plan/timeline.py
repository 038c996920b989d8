"""Tracks the lifetimes of tensor storages under fake tensors, to find the peak memory of a step.

Under torch's fake tensors nothing is computed and nothing allocated, but every tensor has a shape, a type and a life;
so the memory of a step of any model can be counted on any machine.
"""

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

#: Kinds of tensors during a step: kept for the backward pass, gradients of weights, (tokens, vocabulary) values of the
#: LM head, or anything else. `alignment.plan.trace` adds `keys`: keys, values and their gradients, of pieces.
KINDS = ("activations", "gradients", "logits", "working")


@dataclass
class _Life:
    size: int  # bytes
    allocated: int  # event
    freed: int | None = None
    is_logits: bool = False


class Timeline(TorchDispatchMode):
    """Records when each storage that an operation makes is allocated and freed. Each of the two is an event.

    Attributes:
        now: The latest event.
        flops: Floating-point operations of the matrix products and attention kernels until now.

    Args:
        known: Tensors that were there before and are not counted: weights and inputs.
        vocabulary: Size of the last dimension that makes a tensor logits.

    Example:
        >>> x = torch.zeros(256, 4)
        >>> with Timeline([x], vocabulary=32) as timeline:
        ...     y = x.exp()  # kept
        ...     z = (y * 2).sum()  # the product lives until the sum is made
        >>> [timeline.alive_at(event)["working"] for event in range(1, timeline.now + 1)]
        [4096, 8192, 8196, 4100]
    """

    def __init__(self, known: Iterable[Tensor], vocabulary: int):
        super().__init__()
        self.now = self.flops = 0
        self._vocabulary = vocabulary
        self._lives: list[_Life] = []
        self._held = [tensor.untyped_storage() for tensor in known]  # kept, so that no other gets their ids
        self._alive: dict[int, _Life | None] = {id(storage): None for storage in self._held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        is_logits = tensor.dim() == 2 and tensor.shape[-1] == self._vocabulary
        self.now += 1
        self._alive[key] = life = _Life(storage.nbytes(), self.now, is_logits=is_logits)
        self._lives.append(life)
        weakref.finalize(storage, self._free, key, life)

    def _free(self, key: int, life: _Life) -> None:
        self._alive.pop(key, None)
        self.now += 1
        life.freed = self.now

    def classify(self, forward_end: int, gradients: Iterable[Tensor]) -> None:
        """Sorts the tensors into `KINDS`, once the step is over.

        Args:
            forward_end: `now` at the end of the forward pass.
            gradients: The gradients of the weights.
        """
        of_weights = {id(self._alive.get(id(gradient.untyped_storage()))) for gradient in gradients}
        self._kinds = []
        for life in self._lives:
            kept = life.allocated <= forward_end and (life.freed is None or life.freed > forward_end)
            kind = "gradients" if id(life) in of_weights else "logits" if life.is_logits else "working"
            self._kinds.append("activations" if kept and kind == "working" else kind)

    def alive_at(self, event: int) -> dict[str, int]:
        """Bytes alive after an event, by kind."""
        parts = dict.fromkeys(KINDS, 0)
        kinds = getattr(self, "_kinds", itertools.repeat("working"))
        for life, kind in zip(self._lives, kinds, strict=False):
            if life.allocated <= event and (life.freed is None or life.freed > event):
                parts[kind] += life.size
        return parts

    def peak(self, begin: int, end: int) -> dict[str, int]:
        """Bytes by kind when most are alive, between two events."""
        changes = [0] * (self.now + 2)
        for life in self._lives:
            changes[life.allocated] += life.size
            if life.freed is not None:
                changes[life.freed] -= life.size
        totals = list(itertools.accumulate(changes))
        return self.alive_at(max(range(begin, end + 1), key=totals.__getitem__))


def fake_copy(module: torch.nn.Module, fake: Any) -> None:
    """Gives a module on the meta device weights and buffers that are fake tensors of the CPU; tied ones stay tied.

    Args:
        module: Changed in place.
        fake: A `FakeTensorMode`.
    """
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with fake:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_weight else new
                tensors[name] = made[id(tensor)]
