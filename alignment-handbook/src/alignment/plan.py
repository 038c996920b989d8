"""The arithmetic of a run, before anything is loaded: what one optimizer step sees, and how many there are."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainingArguments


@dataclass(frozen=True)
class Plan:
    """Batch sizes in prompts; steps are optimizer steps."""

    num_processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    num_prompts: int
    num_epochs: float
    num_steps: int
    warmup_steps: int

    def __str__(self) -> str:
        return (
            f"Global batch: {self.per_device_train_batch_size} per device x {self.gradient_accumulation_steps} "
            f"accumulation x {self.num_processes} processes = {self.global_batch_size} prompts a step. "
            f"{self.num_prompts} prompts, {self.num_epochs:g} epochs: {self.num_steps} steps, "
            f"{self.warmup_steps} of them warm-up."
        )

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


def plan_run(args: TrainingArguments, num_prompts: int) -> Plan:
    """Works out the global batch and the number of steps as the Trainer will.

    Args:
        args: Of the run; `world_size` is the number of processes it was launched with.
        num_prompts: Rows to train on, after those that cannot be used were dropped.
    """
    micro_batches = math.ceil(math.ceil(num_prompts / args.per_device_train_batch_size) / args.world_size)
    if args.dataloader_drop_last:
        micro_batches = num_prompts // (args.per_device_train_batch_size * args.world_size)
    steps_per_epoch = max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return Plan(
        num_processes=args.world_size,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        global_batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        num_prompts=num_prompts,
        num_epochs=round(num_steps / steps_per_epoch, 4),
        num_steps=num_steps,
        warmup_steps=args.get_warmup_steps(num_steps),
    )
