"""The metrics of an optimizer step, gathered from all processes in one exchange."""

import logging
import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_nca.logps import Batch
from trl_nca.metrics import stack_metrics

logger = logging.getLogger(__name__)

#: Share of a log-prob that it may differ by from run to run, in 16 bits too.
_ROUNDING = 0.01


class StepMetrics:
    """Collects the metrics of micro-batches, and gathers them into `trainer._metrics`, whose lists upstream averages.

    What else the processes must know of each other comes with them: whether one was asked to stop, how many tokens it
    ran, and which rows have a loss that is not finite. A training step has one exchange, just before the optimizer's
    step (`SkipNonFiniteSteps`).

    Args:
        trainer: An `NCATrainer`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._batches: list[dict[str, Tensor]] = []
        self._locations: list[str] = []
        self._num_tokens = 0

    def record(self, metrics: dict[str, Tensor], batch: Batch) -> None:
        """Keeps the metrics of a micro-batch until they are gathered; those of an evaluation are gathered at once.

        Args:
            metrics: One value a prompt: `trl_nca.metrics.group_metrics`, after any others. Shape (B,) each.
            batch: The micro-batch, from `GroupCollator`.
        """
        self._batches.append(metrics)
        self._locations += batch["location"]
        self._num_tokens += batch["input_ids"].numel()
        if not self.trainer.model.training:
            self.gather()

    def gather(self) -> None:
        """Gathers what was kept, so that each prompt of all processes counts once in the mean that is logged."""
        trainer, mode = self.trainer, "train" if self.trainer.model.training else "eval"
        names, table = stack_metrics(self._batches)
        stop, tokens = torch.zeros_like(table[:, :2]).split(1, dim=1)  # both are read as sums over the prompts
        stop[0], tokens[0] = trainer.preemption.stop_requested, self._num_tokens
        table = torch.cat([stop, tokens, table], dim=1)  # (prompts, 2 + metrics), the ranks last
        locations, self._batches, self._locations, self._num_tokens = self._locations, [], [], 0
        table = trainer.accelerator.pad_across_processes(table, dim=1, pad_index=float("nan"))  # to the largest K
        names += [f"rewards/rank_{k}" for k in range(table.shape[1] - 2 - len(names))]
        # Evaluation fills the last batch up with prompts it has seen: gather_for_metrics drops those.
        gather = trainer.accelerator.gather if mode == "train" else trainer.accelerator.gather_for_metrics
        stops, tokens, *columns = gather(table).T.tolist()
        trainer.preemption.stopped |= any(stops)
        if mode == "train" and trainer.args.include_num_input_tokens_seen != "no":
            trainer.state.num_input_tokens_seen += int(sum(tokens))
        if mode == "train" and trainer.state.global_step == 0:
            self._check_start(dict(zip(names, columns, strict=True)))
        for name, values in zip(names, columns, strict=True):
            if name == "loss" and mode == "train":  # the Trainer logs it, over the accumulation steps
                if not all(map(math.isfinite, values)):
                    rows = zip(gather_object(locations), values, strict=True)
                    trainer.nonfinite.mark_non_finite([row for row, value in rows if not math.isfinite(value)])
            elif finite := [value for value in values if math.isfinite(value)]:
                trainer._metrics[mode][name] += finite

    def _check_start(self, metrics: dict[str, list[float]]) -> None:
        """Warns where the first step's rewards are not 0: the reference is another model than training starts from."""
        logratios = [reward / self.trainer.args.beta for reward in metrics["rewards/chosen"]]
        largest = max(map(abs, logratios), default=0.0)
        if largest > _ROUNDING * max(map(abs, metrics["logps/chosen"]), default=0.0):
            logger.warning(
                "Before the first step, policy and reference differ in the log-prob of a response by up to %.2g nats: "
                "dropout or noise, or the reference is not the model that training starts from",
                largest,
            )
