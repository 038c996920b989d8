"""What several processes need beside accelerate's own: agreed numbers, and gradients that stay on their process."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn


def max_over_ranks(accelerator: Accelerator, number: int) -> int:
    """The largest of a number over all processes. Called by all of them."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


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
