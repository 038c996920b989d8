"""What is alive when: births and deaths of tensors' memory during a step, without the memory itself.

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

#: What a tensor that lives during a step is: kept for the backward pass, a gradient of a weight, (tokens, vocabulary)
#: values of the LM head, or anything else.
KINDS = ("activations", "gradients", "logits", "working")


@dataclass
class _Life:
    size: int  # bytes
    born: int  # events
    died: int | None = None
    is_logits: bool = False


class Timeline(TorchDispatchMode):
    """Notes each storage that an operation makes, from its birth to its death. An event is one or the other.

    Args:
        known: Tensors that were there before and are not counted: weights and inputs.
        vocabulary: Size of the last dimension by which logits are told from other tensors.

    Example:
        >>> x = torch.zeros(256, 4)
        >>> with Timeline([x], vocabulary=32) as timeline:
        ...     y = x.exp()  # kept
        ...     z = (y * 2).sum()  # the product lives until the sum is made
        >>> [timeline.parts_at(moment)["working"] for moment in range(1, timeline.now + 1)]
        [4096, 8192, 8196, 4100]
    """

    def __init__(self, known: Iterable[Tensor], vocabulary: int):
        super().__init__()
        self.now = 0
        self._vocabulary = vocabulary
        self._lives: list[_Life] = []
        self._held = [tensor.untyped_storage() for tensor in known]  # kept, so that no other gets their ids
        self._alive: dict[int, _Life | None] = {id(storage): None for storage in self._held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
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
        life.died = self.now

    def sort(self, forward_end: int, gradients: Iterable[Tensor]) -> None:
        """Says what each tensor was, once the step is over.

        Args:
            forward_end: `now` at the end of the forward pass.
            gradients: Those of the weights.
        """
        of_weights = {id(self._alive.get(id(gradient.untyped_storage()))) for gradient in gradients}
        self._kinds = []
        for life in self._lives:
            kept = life.born <= forward_end and (life.died is None or life.died > forward_end)
            kind = "gradients" if id(life) in of_weights else "logits" if life.is_logits else "working"
            self._kinds.append("activations" if kept and kind == "working" else kind)

    def parts_at(self, moment: int) -> dict[str, int]:
        """Bytes alive after an event, by kind."""
        parts = dict.fromkeys(KINDS, 0)
        kinds = getattr(self, "_kinds", itertools.repeat("working"))
        for life, kind in zip(self._lives, kinds, strict=False):
            if life.born <= moment and (life.died is None or life.died > moment):
                parts[kind] += life.size
        return parts

    def fullest(self, begin: int, end: int) -> dict[str, int]:
        """Bytes by kind at the moment of the most, between two events."""
        changes = [0] * (self.now + 2)
        for life in self._lives:
            changes[life.born] += life.size
            if life.died is not None:
                changes[life.died] -= life.size
        totals = list(itertools.accumulate(changes))
        return self.parts_at(max(range(begin, end + 1), key=totals.__getitem__))


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
