"""What several processes need beside accelerate's own: agreed numbers, and gradients that stay on their process."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from trl_nca.chunks import NumForwards
from trl_nca.layout import to_device


def most_forwards(accelerator: Accelerator, counts: Sequence[NumForwards]) -> list[NumForwards]:
    """The most forwards of all processes for each of several batches. Called by all of them, for as many batches."""
    table = to_device(torch.tensor([[c.chunks, c.before] for c in counts]), accelerator.device)
    return [NumForwards(*row) for row in accelerator.gather(table[None]).amax(dim=0).tolist()]


@contextlib.contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Gradients are accumulated, and neither exchanged between processes nor, by DeepSpeed, stepped on.

    Unlike `Accelerator.no_sync` it may be used inside the last micro-batch of a step, after which the state that the
    Trainer has set is restored.
    """
    state = accelerator.gradient_state
    was_last = state.sync_gradients  # False: the Trainer has seen to it
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model) if was_last else contextlib.nullcontext():
            yield
    finally:
        state._set_sync_gradients(was_last)
