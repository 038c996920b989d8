"""The report of a run while it runs, and its alarm: written at each evaluation, and sent to the experiment trackers.

In code of your own, where no recipe is, the callback keeps the whole folder that a report needs:

    trainer.add_callback(ReportCallback(trainer))
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer

from alignment import output
from alignment.data.lengths import Columns
from alignment.data.report import describe
from alignment.data.weights import describe_weights
from alignment.evaluation.held_out import bootstrap_interval, prompt_means
from alignment.files import read_json, write_json, write_text
from alignment.report.alarm import Alarm, alarm
from alignment.report.environment import describe_environment
from alignment.report.html import report_run
from alignment.report.runs import ENVIRONMENT, HELD_OUT
from alignment.report.trackers import sample_logs, send

logger = logging.getLogger(__name__)

#: Logged numbers of each held-out prompt that are kept.
_OF_PROMPTS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logratios/chosen")


class ReportCallback(TrainerCallback):
    """Writes the report at each evaluation, on the main process; without held-out rows, at each checkpoint.

    The scripts write the files that a report is made of, and the last report. For a trainer that was made without them
    (its `args.recipe` is empty) the callback writes both.

    Args:
        trainer: An `NCATrainer`, whose `eval_metrics` are those of the evaluation that is running.
    """

    def __init__(self, trainer: DPOTrainer):
        self._trainer = trainer
        self._held_out: dict[str, list[float]] = {}
        self._is_training = False
        self._warned = 0  # 1: of an alarm; 2: of a large one

    @property
    def _is_alone(self) -> bool:
        return not self._trainer.args.recipe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to write reports; sends the score of the samples before training, which trackers take from now on."""
        self._is_training = True
        if not state.is_world_process_zero:
            return
        if self._is_alone:
            _start(self._trainer)
        elif state.global_step == 0 and (before := read_json(Path(args.output_dir) / "samples_before.json")):
            means = prompt_means(before)
            means = means[np.isfinite(means)]
            send(self._trainer, sample_logs(float(means.mean()), bootstrap_interval(means)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops to write reports: the script writes the last one, which has more in it."""
        self._is_training = False
        if self._is_alone and state.is_world_process_zero:
            state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
            train = state.log_history[-1]
            results = {"train": train, "eval": None, "samples": None, "beta": args.beta, "output_dir": args.output_dir}
            output.finish(args.output_dir, results | {"seconds": train.get("train_runtime", 0.0)})
            write_report(args.output_dir, state.log_history)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the lists: upstream averages and drops them before `on_evaluate`."""
        self._held_out = {name: self._trainer.eval_metrics.get(name, []) for name in _OF_PROMPTS}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the rewards of the held-out prompts and the report, and sends the size of the alarm."""
        if not state.is_world_process_zero:
            return
        if output.has_started(args.output_dir):  # else a script that keeps no such folder
            write_json(Path(args.output_dir) / HELD_OUT, {"step": state.global_step, **self._held_out})
        if self._is_training or (self._is_alone and output.has_started(args.output_dir)):
            self._write(args.output_dir, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the report, where there is no evaluation."""
        if state.is_world_process_zero and args.eval_strategy == "no" and self._is_training:
            self._write(args.output_dir, state)

    def _write(self, output_dir: str, state: TrainerState) -> None:
        found = write_report(output_dir, state.log_history, warned=self._warned)
        self._warned = max(self._warned, _level(found))
        send(self._trainer, {"alarm/nats": found.nats if found else 0.0})


def write_report(output_dir: str, history: list[dict[str, float]] | None = None, warned: int = 0) -> Alarm | None:
    """Writes the report, and logs the alarm. An error of it is logged as a warning and never ends a run.

    Args:
        output_dir: Output folder of the run.
        history: What was logged so far. Default: what the folder holds.
        warned: Nothing is logged of an alarm up to this level: 0 none, 1 one, 2 a large one.

    Returns:
        The alarm, if there is one.
    """
    try:
        found = alarm(report_run(output_dir, history))
    except Exception as error:  # a full disk, a font, a file that was edited: whatever it is, training continues
        logger.warning("The report could not be written: %s: %s", type(error).__name__, error)
        return None
    if found and _level(found) > warned:
        logger.warning("%s%s", "!!! " if found.is_large else "", found)
    return found


def _level(found: Alarm | None) -> int:
    return 0 if found is None else 1 + found.is_large


def _start(trainer: DPOTrainer) -> None:
    """Writes the files that a report is made of, for a trainer that no script has made."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.state.global_step == 0:  # else it resumes, and they are its own
        for name in (output.FINISHED, HELD_OUT, "samples_before.json", "samples_after.json"):
            (folder / name).unlink(missing_ok=True)
    recipe, defaults = output.resolve([args]), {field.name: field.default for field in dataclasses.fields(args)}
    given = [key for key, value in recipe.items() if value != defaults.get(key)]
    model = {"model_name_or_path": trainer.accelerator.unwrap_model(trainer.model).name_or_path}
    write_text(folder / output.STARTED, yaml.safe_dump(model | recipe, sort_keys=False))
    environment = describe_environment(args.device, args.world_size)
    write_json(folder / ENVIRONMENT, environment | {"given": [*model, *given]})
    write_json(folder / "plan.json", {"num_steps": trainer.state.max_steps, "num_processes": args.world_size})
    alpha = args.alpha if args.loss.uses_alpha else None
    report = _describe_rows(trainer.train_dataset, alpha)
    has_rows = hasattr(trainer.eval_dataset, "column_names") and isinstance(trainer.eval_dataset.column_names, list)
    report["eval"] = _describe_rows(trainer.eval_dataset, alpha) if has_rows else None
    write_json(folder / "data_report.json", report)


def _describe_rows(rows: Any, alpha: float | None) -> dict[str, Any]:
    num_rows, columns = len(rows), Columns.of_tokens(rows)
    counts = {"rows_in": num_rows, "rows_kept": num_rows, "dropped_by_reason": {}, "fixed_by_reason": {}}
    return counts | {"responses": int(columns.num_responses.sum())} | describe(columns, alpha) | describe_weights(rows)
