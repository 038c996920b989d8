"""The metrics of an optimizer step, gathered from all processes in one exchange."""

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_nca.metrics import stack_metrics


class StepMetrics:
    """Collects the metrics of micro-batches, and gathers them into `trainer._metrics`, whose lists upstream averages.

    What the processes must agree on comes with them: whether one of them was asked to stop, and which rows have a loss
    that is not finite. A training step has one exchange, just before the optimizer's step (`SkipNonFiniteSteps`).

    Args:
        trainer: An `NCATrainer`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._batches: list[dict[str, Tensor]] = []
        self._locations: list[str] = []

    def record(self, metrics: dict[str, Tensor], locations: list[str]) -> None:
        """Keeps the metrics of a micro-batch until they are gathered; those of an evaluation are gathered at once.

        Args:
            metrics: One value a prompt: `trl_nca.metrics.group_metrics`, after any others. Shape (B,) each.
            locations: Where the B rows stand.
        """
        self._batches.append(metrics)
        self._locations += locations
        if not self.trainer.model.training:
            self.gather()

    def gather(self) -> None:
        """Gathers what was kept, so that each prompt of all processes counts once in the mean that is logged."""
        trainer, mode = self.trainer, "train" if self.trainer.model.training else "eval"
        names, table = stack_metrics(self._batches)
        locations, self._batches, self._locations = self._locations, [], []
        stop = torch.full_like(table[:, :1], trainer.preemption.stop_requested)
        table = torch.cat([stop, table], dim=1)  # (prompts, 1 + metrics), the ranks last
        table = trainer.accelerator.pad_across_processes(table, dim=1, pad_index=float("nan"))  # to the largest K
        names += [f"rewards/rank_{k}" for k in range(table.shape[1] - 1 - len(names))]
        # Evaluation fills the last batch up with prompts it has seen: gather_for_metrics drops those.
        gather = trainer.accelerator.gather if mode == "train" else trainer.accelerator.gather_for_metrics
        stops, *columns = gather(table).T.tolist()
        trainer.preemption.stopped |= any(stops)
        for name, values in zip(names, columns, strict=True):
            if name == "loss" and mode == "train":  # the Trainer logs it, over the accumulation steps
                if not all(map(math.isfinite, values)):
                    rows = zip(gather_object(locations), values, strict=True)
                    trainer.nonfinite.mark_non_finite([row for row, value in rows if not math.isfinite(value)])
            elif finite := [value for value in values if math.isfinite(value)]:
                trainer._metrics[mode][name] += finite
