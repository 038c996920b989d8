"""What a run prints: a line for each logged step and each evaluation, bars in a terminal, and last what to do next.

Every logged number is in trainer_state.json, and goes to trackers, under the name that TRL gives it.
"""

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
#: What a line says of the metrics: name, key, format.
_METRICS = (
    ("loss", "loss", "5.3f"),
    ("margin", "rewards/margins", "+.3f"),
    ("best", "rewards/chosen", "+.3f"),
    ("acc", "rewards/accuracies", ".2f"),
    ("lr", "learning_rate", ".1e"),
)


class ConsoleCallback(TrainerCallback):
    """Prints `log_line` where upstream prints the whole dict, and names the progress bars."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}
        self._begin = (0.0, 0)  # seconds and steps, when training began
        self._since: tuple[float, int] | None = None  # seconds and tokens, when the newest window began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Starts the clock and the bar."""
        self._begin = time.monotonic(), state.global_step
        self._advance("training", args, state, state.max_steps, state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Starts the clock of a window: after a log, or after an evaluation or a checkpoint, which are no training."""
        self._since = self._since or (time.monotonic(), state.num_input_tokens_seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._advance("training", args, state, state.max_steps, 1)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of an evaluation."""
        self._advance("evaluation", args, state, len(eval_dataloader), 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Closes the bar of an evaluation."""
        self._close("evaluation")
        self._since = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stops the clock."""
        self._since = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self._close("training")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Prints the line. (The last log of a training has no loss of its own; the final table has what it says.)"""
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        speed = left = None
        if "loss" in logs:
            now, (begin, first_step) = time.monotonic(), self._begin
            left = (now - begin) / max(state.global_step - first_step, 1) * (state.max_steps - state.global_step)
            if self._since and state.num_input_tokens_seen:
                speed = (state.num_input_tokens_seen - self._since[1]) / (now - self._since[0])
            self._since = None
        tqdm.write(log_line(logs, state.global_step, state.max_steps, speed, left))
        sys.stdout.flush()

    def _advance(self, name: str, args: TrainingArguments, state: TrainerState, total: int, by: int) -> None:
        if not state.is_world_process_zero:
            return
        if name not in self._bars:
            settings = {
                "dynamic_ncols": True,
                "leave": False,
                "disable": args.disable_tqdm or None,
            }  # None: by terminal
            self._bars[name] = tqdm(desc=name, total=total, **settings)
        self._bars[name].update(by)

    def _close(self, name: str) -> None:
        if name in self._bars:
            self._bars.pop(name).close()


def print_lines(trainer: Trainer) -> None:
    """Prints lines in place of upstream's dicts. In a notebook its table stays."""
    if trainer.pop_callback(PrinterCallback) or trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ConsoleCallback())


def log_line(
    logs: Mapping[str, float], step: int, steps: int, speed: float | None = None, left: float | None = None
) -> str:
    """What was logged at a step or an evaluation, in a line whose columns stand below each other.

    Args:
        logs: Metrics under TRL's names, with `eval_` before them where they are an evaluation's.
        step: The optimizer step.
        steps: Steps of the whole run.
        speed: Tokens a second; None: not known.
        left: Seconds until training ends; None: not known.

    Example:
        >>> logs = {"loss": 1.3837, "rewards/margins": 0.02, "rewards/chosen": -0.01, "rewards/accuracies": 0.55}
        >>> log_line(logs | {"learning_rate": 6e-4}, 5, 32, speed=1600, left=40)
        'step  5/32  loss 1.384  margin +0.020  best -0.010  acc 0.55  lr 6.0e-04   1.6k tok/s  00:40 left'
        >>> log_line({f"eval_{key}": value for key, value in logs.items()}, 32, 32)
        'eval 32/32  loss 1.384  margin +0.020  best -0.010  acc 0.55'
    """
    name, prefix = ("eval", "eval_") if "eval_loss" in logs else ("step", "")
    parts = [f"{name} {step:>{len(str(steps))}}/{steps}"]
    parts += [f"{label} {logs[prefix + key]:{form}}" for label, key, form in _METRICS if prefix + key in logs]
    if speed is not None:
        parts.append(f"{speed / 1000:4.1f}k tok/s" if speed >= 1000 else f"{speed:5.0f} tok/s")
    if left is not None:
        parts.append(f"{tqdm.format_interval(left)} left")
    return "  ".join(parts)


def next_steps(output_dir: str) -> list[tuple[str, str]]:
    """What to do with a finished run: names and commands to paste, for the final table.

    Args:
        output_dir: The run's folder. What has no adapter is whole, and needs no merging.
    """

    here = Path(sys.executable)
    is_found = Path(shutil.which("python") or "").parent == here.parent  # the environment is activated

    python = "python" if is_found else os.path.relpath(here)

    def command(script: str) -> str:
        file = SCRIPTS / f"{script}.py"
        return f"{python} {os.path.relpath(file)}" if file.is_file() else f"nca {script}"

    steps = [("talk to it", f"{command('chat')} {output_dir}")]
    report = Path(output_dir) / "report.html"
    if report.is_file():
        address = f"file://{report}" if report.is_absolute() else f"file://$PWD/{report}"
        steps.insert(0, ("look at it", f"{python} -m webbrowser {address}"))
    if (Path(output_dir) / "adapter_config.json").is_file():
        folder = output_dir.rstrip("/")
        steps.append(("merge it", f"{command('merge')} {folder} --output {folder}-merged"))
    return steps
