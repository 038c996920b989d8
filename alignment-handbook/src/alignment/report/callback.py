"""The report of a run while it runs, and its alarm: written at each evaluation."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer

from alignment import output
from alignment.files import write_json
from alignment.report.alarm import alarm
from alignment.report.html import report_run
from alignment.report.runs import HELD_OUT

logger = logging.getLogger(__name__)


class ReportCallback(TrainerCallback):
    """Writes the report at each evaluation, on the main process; without held-out rows, at each checkpoint.

    Args:
        trainer: An `NCATrainer`, whose `eval_metrics` are those of the evaluation that is running.
    """

    def __init__(self, trainer: DPOTrainer):
        self._trainer = trainer
        self._held_out: dict[str, list[float]] = {}
        self._is_training = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts to write reports."""
        self._is_training = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops to write reports: the script writes the last one, which has more in it."""
        self._is_training = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the lists: upstream averages and drops them before `on_evaluate`."""
        names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")
        self._held_out = {name: self._trainer.eval_metrics.get(name, []) for name in names}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the rewards of the held-out prompts, and the report."""
        if not state.is_world_process_zero:
            return
        if output.has_started(args.output_dir):  # else a script that keeps no such folder
            write_json(Path(args.output_dir) / HELD_OUT, {"step": state.global_step, **self._held_out})
        if self._is_training:
            write_report(args.output_dir, state.log_history)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the report, where there is no evaluation."""
        if state.is_world_process_zero and args.eval_strategy == "no" and self._is_training:
            write_report(args.output_dir, state.log_history)


def write_report(output_dir: str, history: list[dict[str, float]] | None = None) -> None:
    """Writes the report, and logs the alarm. An error of it is logged as a warning and never ends a run.

    Args:
        output_dir: Output folder of the run.
        history: What was logged so far. Default: what the folder holds.
    """
    try:
        found = alarm(report_run(output_dir, history))
    except Exception as error:  # a full disk, a font, a file that was edited: whatever it is, training continues
        logger.warning("The report could not be written: %s: %s", type(error).__name__, error)
    else:
        if found:
            logger.warning("!!! %s", found)
