"""The report of a run that is running, and its alarm: written at each evaluation."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment import output
from alignment.html_report import report_run
from alignment.runs import HELD_OUT, alarm

logger = logging.getLogger(__name__)


class Watch(TrainerCallback):
    """Writes the report at each evaluation, on the main process; without held-out rows, at each checkpoint.

    Args:
        values: The metrics that are being evaluated: a list of numbers for each, one a prompt.
    """

    def __init__(self, values: Callable[[], Mapping[str, list[float]]]):
        self._values = values
        self._held_out: dict[str, list[float]] = {}
        self._is_training = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """From here on evaluations are written about."""
        self._is_training = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """From here on the script is: it has more to tell."""
        self._is_training = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Holds on to the lists: upstream lets go of them before `on_evaluate`, when it has averaged them."""
        names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")
        self._held_out = {name: self._values().get(name, []) for name in names}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps the rewards of the held-out prompts, and reports."""
        if not state.is_world_process_zero:
            return
        if output.has_started(args.output_dir):  # else a script that keeps no such folder
            output.write_json(args.output_dir, HELD_OUT, {"step": state.global_step, **self._held_out})
        if self._is_training:
            write_report(args.output_dir, state.log_history)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reports, where no evaluation does."""
        if state.is_world_process_zero and args.eval_strategy == "no" and self._is_training:
            write_report(args.output_dir, state.log_history)


def write_report(output_dir: str, history: list[dict[str, float]] | None = None) -> None:
    """Writes the report, and logs the alarm. What goes wrong with it is a warning: it never ends a run.

    Args:
        output_dir: Of the run.
        history: What was logged so far. Default: what the folder tells.
    """
    try:
        found = alarm(report_run(output_dir, history))
    except Exception as error:  # a full disk, a font, a file that was edited: whatever it is, training goes on
        logger.warning("No report is written of this moment: %s: %s", type(error).__name__, error)
    else:
        if found:
            logger.warning("!!! %s", found)
