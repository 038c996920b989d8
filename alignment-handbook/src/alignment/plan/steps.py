"""The arithmetic of a run, before anything is loaded: what one optimizer step sees, and how many there are."""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainingArguments

from alignment.errors import UserError
from alignment.recipe import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The plan of a run: batch sizes in prompts, optimizer steps, and tokens, each prompt counted once.

    None is what is not known without the data.
    """

    num_processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    num_prompts: int | None
    num_tokens: int | None
    num_epochs: float | None
    num_steps: int | None
    warmup_steps: int | None

    def __str__(self) -> str:
        batch = (
            f"Global batch: {self.per_device_train_batch_size} per device x {self.gradient_accumulation_steps} "
            f"accumulation x {self.num_processes} processes = {self.global_batch_size} prompts a step. "
        )
        if self.num_steps is None:
            return batch + "Steps: not known without the data."
        steps = f"{self.num_steps} steps, {self.warmup_steps} of them warm-up"
        if self.num_prompts is not None:
            steps = f"{self.num_prompts} prompts, {self.num_epochs:g} epochs: {steps}"
        return f"{batch}{steps}; {'number of' if self.num_tokens is None else self.num_tokens} tokens" + (
            " not known." if self.num_tokens is None else "."
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for plan.json."""
        return asdict(self)


def set_global_batch(args: TrainingArguments, config: RunConfig, num_processes: int) -> None:
    """Sets micro-batch and accumulation so that a step sees `config.global_batch_size` prompts.

    Where the tokens of a forward are bounded, a process gets its prompts in one micro-batch, unless a key says
    otherwise: forwards are then as full as the bound lets them be, and a GPU takes as long for a small one. A
    `gradient_accumulation_steps` that was given stays, and a line says what global batch it makes.

    Args:
        args: Training arguments, those of `NCAConfig`.
        config: `global_batch_size`, and which keys were given.
        num_processes: Processes of the run.

    Raises:
        UserError: The prompts cannot be split evenly; names the nearest numbers that can.
    """
    wanted, accumulates = config.global_batch_size, "gradient_accumulation_steps" in config.given
    if wanted is None:
        return
    if wanted < 1:
        raise UserError(f"global_batch_size: must be at least 1, got {wanted}")
    if args.max_tokens_per_forward and "per_device_train_batch_size" not in config.given:
        shares = num_processes * (args.gradient_accumulation_steps if accumulates else 1)
        args.per_device_train_batch_size = 1 if wanted % shares else wanted // shares
    at_once = args.per_device_train_batch_size * num_processes
    if accumulates:
        made = at_once * args.gradient_accumulation_steps
        if made != wanted:
            logger.warning(
                "!!! gradient_accumulation_steps=%d was given: a step sees %d prompts, not the recipe's %d "
                "(global_batch_size). Results and learning rate are for %d.",
                args.gradient_accumulation_steps, made, wanted, wanted,
            )  # fmt: skip
        return
    if wanted % at_once:
        sizes = sorted({max(wanted // at_once, 1) * at_once, (wanted // at_once + 1) * at_once})
        smaller = [d for d in range(1, args.per_device_train_batch_size) if wanted % (d * num_processes) == 0]
        processes = [n for n in range(1, wanted + 1) if wanted % (n * args.per_device_train_batch_size) == 0]
        near = sorted(processes, key=lambda n: (abs(n - num_processes), -n))[:2]
        choices = [f"--global_batch_size={' or '.join(map(str, sizes))}"]
        choices += [f"--per_device_train_batch_size={smaller[-1]}"] if smaller else []
        choices += [f"{' or '.join(map(str, sorted(near)))} processes"] if near else []
        raise UserError(
            f"global_batch_size: {wanted} prompts cannot be split over {num_processes} processes with "
            f"{args.per_device_train_batch_size} at once on each; the nearest that can: {'; '.join(choices)}"
        )
    args.gradient_accumulation_steps = wanted // at_once


def plan_run(
    args: TrainingArguments, num_processes: int, num_prompts: int | None, num_tokens: int | None = None
) -> Plan:
    """Works out the global batch and the number of steps as the Trainer will.

    Args:
        args: Training arguments.
        num_processes: Processes of the run.
        num_prompts: Rows to train on, without those that were dropped; None: not known.
        num_tokens: Their tokens; None: not known.
    """
    batch = {
        "num_processes": num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes,
    }
    if num_prompts is None:
        num_steps = args.max_steps if args.max_steps > 0 else None
        warmup_steps = args.get_warmup_steps(num_steps) if num_steps else None
        return Plan(**batch, num_prompts=None, num_tokens=None, num_epochs=None, num_steps=num_steps,
                    warmup_steps=warmup_steps)  # fmt: skip
    micro_batches = math.ceil(math.ceil(num_prompts / args.per_device_train_batch_size) / num_processes)
    if args.dataloader_drop_last:
        micro_batches = num_prompts // (args.per_device_train_batch_size * num_processes)
    steps_per_epoch = max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return Plan(
        **batch,
        num_prompts=num_prompts,
        num_tokens=None if num_tokens is None else round(num_tokens * num_steps / steps_per_epoch),
        num_epochs=round(num_steps / steps_per_epoch, 4),
        num_steps=num_steps,
        warmup_steps=args.get_warmup_steps(num_steps),
    )
