"""The arithmetic of a run, before anything is loaded: what one optimizer step sees, and how many there are."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainingArguments

from alignment.errors import UserError
from alignment.recipe import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Batch sizes in prompts; steps are optimizer steps; tokens are those that are run, each prompt once."""

    num_processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    num_prompts: int
    num_tokens: int
    num_epochs: float
    num_steps: int
    warmup_steps: int

    def __str__(self) -> str:
        return (
            f"Global batch: {self.per_device_train_batch_size} per device x {self.gradient_accumulation_steps} "
            f"accumulation x {self.num_processes} processes = {self.global_batch_size} prompts a step. "
            f"{self.num_prompts} prompts, {self.num_epochs:g} epochs: {self.num_steps} steps, "
            f"{self.warmup_steps} of them warm-up; {self.num_tokens} tokens."
        )

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


def set_global_batch(args: TrainingArguments, config: RunConfig) -> None:
    """Sets `args.gradient_accumulation_steps` so that a step sees `config.global_batch_size` prompts.

    A number of accumulation steps that was given by hand stays, and a line says what global batch it makes.

    Args:
        args: Of the run; `world_size` is the number of processes it was launched with.
        config: `global_batch_size`, and which keys were given.

    Raises:
        UserError: The prompts cannot be split evenly; names the nearest numbers that can.
    """
    wanted, at_once = config.global_batch_size, args.per_device_train_batch_size * args.world_size
    if wanted is None:
        return
    if wanted < 1:
        raise UserError(f"global_batch_size: must be at least 1, got {wanted}")
    if "gradient_accumulation_steps" in config.given:
        made = at_once * args.gradient_accumulation_steps
        if made != wanted:
            logger.warning(
                "!!! gradient_accumulation_steps=%d was given by hand: a step sees %d prompts, not the recipe's %d "
                "(global_batch_size). Results and learning rate are for %d.",
                args.gradient_accumulation_steps, made, wanted, wanted,
            )  # fmt: skip
        return
    if wanted % at_once:
        sizes = sorted({max(wanted // at_once, 1) * at_once, (wanted // at_once + 1) * at_once})
        smaller = [d for d in range(1, args.per_device_train_batch_size) if wanted % (d * args.world_size) == 0]
        processes = [n for n in range(1, wanted + 1) if wanted % (n * args.per_device_train_batch_size) == 0]
        near = sorted(processes, key=lambda n: (abs(n - args.world_size), -n))[:2]
        choices = [f"--global_batch_size={' or '.join(map(str, sizes))}"]
        choices += [f"--per_device_train_batch_size={smaller[-1]}"] if smaller else []
        choices += [f"{' or '.join(map(str, sorted(near)))} processes"] if near else []
        raise UserError(
            f"global_batch_size: {wanted} prompts cannot be split over {args.world_size} processes with "
            f"{args.per_device_train_batch_size} at once on each; the nearest that can: {'; '.join(choices)}"
        )
    args.gradient_accumulation_steps = wanted // at_once


def plan_run(args: TrainingArguments, lengths: Sequence[int]) -> Plan:
    """Works out the global batch and the number of steps as the Trainer will.

    Args:
        args: Of the run; `world_size` is the number of processes it was launched with.
        lengths: Tokens of the rows to train on, after those that cannot be used were dropped.
    """
    num_prompts = len(lengths)
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
        num_tokens=round(sum(lengths) * num_steps / steps_per_epoch),
        num_epochs=round(num_steps / steps_per_epoch, 4),
        num_steps=num_steps,
        warmup_steps=args.get_warmup_steps(num_steps),
    )
