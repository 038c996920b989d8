"""What several processes need beside accelerate's own: agreed numbers, and gradients that stay on their process."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from trl_nca.chunks import NO_MORE, NumForwards, count_forwards
from trl_nca.layout import to_device
from trl_nca.logps import Batch


def most_forwards(trainer: DPOTrainer, batches: Sequence[Batch]) -> list[NumForwards]:
    """The most forwards of all processes for each of several batches. Called by all of them, for as many batches.

    That is where weights are sharded, and each forward takes all of them; else none are needed.
    """
    accelerator, most, separable = trainer.accelerator, trainer.args.max_tokens_per_forward, trainer.args.loss.separable
    if most is None or not trainer._is_sharded:
        return [NO_MORE] * len(batches)
    counts = [count_forwards(batch, most, trainer._shared_prompt, separable) for batch in batches]
    table = to_device(torch.tensor([[c.chunks, c.before] for c in counts]), accelerator.device)
    return [NumForwards(*row) for row in accelerator.gather(table[None]).amax(dim=0).tolist()]


def policy_as_reference(trainer: DPOTrainer) -> nn.Module:
    """The policy, put where it runs: it is the reference of a data set, before the Trainer puts it there to train it.

    DeepSpeed wraps it in an engine, which is kept. FSDP2 shards it, in place, as it will be for training: until then
    it lies in the memory of the CPU, where nothing can be computed for a GPU's batches.
    """
    model, accelerator = trainer.model, trainer.accelerator
    if trainer.is_deepspeed_enabled:
        model = trainer._precompute_engine = trainer._precompute_engine or prepare_deepspeed(model, accelerator)
    elif trainer.is_fsdp_enabled and accelerator.is_fsdp2:
        fsdp2_prepare_model(accelerator, model)
    return model


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
