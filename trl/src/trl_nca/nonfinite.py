"""Steps whose loss or gradient is not finite are skipped. (`checkpoints` never saves weights that are not.)"""

import logging
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_nca.checkpoints import RESUME_HINT, RunStopped

logger = logging.getLogger(__name__)


class SkipNonFiniteSteps(TrainerCallback):
    """Skips optimizer steps that are not finite, names their rows, and ends the run after `max_nan_steps` in a row.

    In the loss that is logged, a step whose loss is not finite counts as the mean of the steps before it.

    Args:
        trainer: The trainer that this is a callback of.

    Attributes:
        num_skipped: Steps in a row that were not finite.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.num_skipped = 0
        self._is_non_finite, self._rows = False, []  # of the current step
        self._loss_before = torch.zeros(())

    def mark_non_finite(self, rows: list[str]) -> None:
        """Marks the current step as not finite.

        Args:
            rows: Locations of the rows whose loss is not finite; none, where only the gradient is not.
        """
        self._is_non_finite = True
        self._rows += rows

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the sum of the losses since the last log."""
        self._loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skips the step if it is not finite, as its metrics have shown (`StepMetrics`).

        Raises:
            RunStopped: It is the `max_nan_steps`-th in a row.
        """
        is_non_finite, rows = self._is_non_finite, self._rows
        self._is_non_finite, self._rows = False, []
        if not is_non_finite:
            self.num_skipped = 0
            return
        self.num_skipped += 1
        what = f"the loss of {', '.join(rows)}" if rows else "the gradient, of finite losses,"
        step = f"Step {state.global_step + 1}: {what} is not finite"
        # DeepSpeed has made its step inside the backward pass: it cannot be skipped.
        if self.num_skipped >= args.max_nan_steps or self.trainer.is_deepspeed_enabled:
            raise RunStopped(
                f"{step}, for {self.num_skipped} steps in a row (max_nan_steps {args.max_nan_steps}). Look at these "
                f"rows, or lower learning_rate; {RESUME_HINT}"
            )
        if rows:
            # Upstream's `logging_nan_inf_filter` would look at each micro-batch's, and wait for the device each time.
            num_steps = state.global_step - self.trainer._globalstep_last_logged
            self.trainer._tr_loss.copy_(self._loss_before * (1 + 1 / num_steps if num_steps else 1))
        logger.warning(
            "!!! %s; the step is skipped (%d of max_nan_steps %d)", step, self.num_skipped, args.max_nan_steps
        )
        if self.trainer.accelerator.scaler is None:  # the scaler of float16 skips such steps by itself
            self.trainer.model.zero_grad(set_to_none=True)  # without gradients an optimizer changes nothing
