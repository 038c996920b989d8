"""The metrics of an optimizer step, gathered from all processes in one exchange."""

import logging
import math
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from trl_nca.logps import Batch
from trl_nca.metrics import stack_metrics

logger = logging.getLogger(__name__)

#: Share of a log-prob that it may differ by from run to run, in 16 bits too.
_ROUNDING = 0.01


class StepMetrics:
    """Collects the metrics of micro-batches, and gathers them into `trainer._metrics`, whose lists upstream averages.

    What else the processes must know of each other comes with them: whether one was asked to stop, how many tokens it
    ran, the gradient's norm, and which rows have a loss that is not finite. A training step has one exchange, just
    before the optimizer's step, and waits for the device there and nowhere else.

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

    def gather(self, grad_norm: Tensor | float | None = None) -> float | None:
        """Gathers what was kept, so that each prompt of all processes counts once in the mean that is logged.

        Args:
            grad_norm: Norm of the step's gradient, on the device or not. One that is not finite marks the step.

        Returns:
            The norm as a number.
        """
        trainer, mode = self.trainer, "train" if self.trainer.model.training else "eval"
        most = _most_responses(getattr(trainer.callback_handler, f"{mode}_dataloader"))
        names, table = _with_all_ranks(*stack_metrics(self._batches), most)
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        once = torch.zeros_like(table[:, :3])  # of a process, and not of a prompt: in its first row
        for i, value in enumerate((trainer.preemption.stop_requested, self._num_tokens, 0 if norm is None else norm)):
            once[:1, i] = value
        table = torch.cat([once, table], dim=1)  # (prompts, 3 + metrics)
        locations, self._batches, self._locations, self._num_tokens = self._locations, [], [], 0
        # Evaluation fills the last batch up with prompts it has seen: gather_for_metrics drops those.
        gather = trainer.accelerator.gather if mode == "train" else trainer.accelerator.gather_for_metrics
        stops, tokens, norms, *columns = gather(table).T.tolist()
        trainer.preemption.stopped |= any(stops)
        # (The scaler of float16 looks for such gradients itself, and skips the step.)
        if trainer.accelerator.scaler is None and not all(map(math.isfinite, norms)):
            trainer.nonfinite.mark_non_finite([])
        if mode == "train" and trainer.args.include_num_input_tokens_seen != "no":
            trainer.state.num_input_tokens_seen += int(sum(tokens))
        if mode == "train" and trainer.state.global_step == 0 and "logratios/chosen" in names:
            self._check_start(dict(zip(names, columns, strict=True)))
        for name, values in zip(names, columns, strict=True):
            if name == "loss" and mode == "train":  # the Trainer logs it, over the accumulation steps
                if not all(map(math.isfinite, values)):
                    rows = zip(gather_object(locations), values, strict=True)
                    trainer.nonfinite.mark_non_finite([row for row, value in rows if not math.isfinite(value)])
            elif finite := [value for value in values if math.isfinite(value)]:
                trainer._metrics[mode][name] += finite
        return None if grad_norm is None else norms[0]

    def _check_start(self, metrics: dict[str, list[float]]) -> None:
        """Warns where the first step's log-ratios are not 0: training does not start from the reference."""
        largest = max(map(abs, metrics["logratios/chosen"]), default=0.0)
        if largest > _ROUNDING * max(map(abs, metrics["logps/chosen"]), default=0.0):
            logger.warning(
                "Before the first step, policy and reference differ in the log-prob of a response by up to %.2g nats: "
                "dropout or noise, or the reference is not the model that training starts from",
                largest,
            )


def _with_all_ranks(names: list[str], table: Tensor, most: int) -> tuple[list[str], Tensor]:
    """The table with a column for each rank that a row of any process may have, so that all are of one width.

    Args:
        names: Names of the columns before `rewards/rank_0`.
        table: Shape (prompts, metrics).
        most: The largest K of all rows.
    """
    num_ranks = max(most, table.shape[1] - len(names))
    names = names + [f"rewards/rank_{k}" for k in range(num_ranks)]
    return names, pad(table, (0, len(names) - table.shape[1]), value=math.nan)


def _most_responses(loader: Any) -> int:
    """The largest K of the rows that a data loader reads, which all processes know; 0 without one."""
    if loader is None:
        return 0
    return pc.max(pc.list_value_length(loader.dataset.data.column("scores"))).as_py()
