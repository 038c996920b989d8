"""Reads a run from its output folder, finished or not: curves, settings, samples, and the alarm."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignment import output
from alignment.errors import UserError
from alignment.files import read_json
from alignment.recipe import read_yaml
from trl_nca.checkpoints import list_checkpoints

#: Implicit reward of each held-out prompt at the newest evaluation; see `report.callback`.
HELD_OUT = "held_out.json"
#: Alarm threshold, in standard errors below zero.
_BEYOND_NOISE = 2.0
#: Logged windows of training that are used where there are no held-out prompts.
_WINDOWS = 5


@dataclass
class Run:
    """The contents of an output folder. None, or empty, is what it does not hold (yet).

    Attributes:
        name: Name of the folder; among others of the same name, with its parents as far as they differ.
        recipe: The resolved recipe.
        history: What was logged, as in trainer_state.json: a dict a log line, of training or of an evaluation.
        plan: As in plan.json.
        data_report: As in data_report.json.
        before, after: Scored samples, see `alignment.evaluation.held_out.sample_and_score`.
        results: As in train_results.json; None until the run is finished.
        held_out: `step`, and of each held-out prompt at that step `rewards/chosen`, `rewards/rejected` and
            `rewards/accuracies`.
    """

    name: str
    recipe: dict[str, Any]
    history: list[dict[str, float]]
    plan: dict[str, Any] = field(default_factory=dict)
    data_report: dict[str, Any] | None = None
    before: list[dict[str, Any]] | None = None
    after: list[dict[str, Any]] | None = None
    results: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None

    @property
    def beta(self) -> float:
        """Implicit rewards are this times nats."""
        return float(self.recipe["beta"])

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(max((entry["step"] for entry in self.history), default=0))

    def curve(self, key: str, x: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
        """A logged number against the epoch: two arrays of shape (log lines that have it,)."""
        # A final evaluation repeats that of the last step.
        points = {entry[x]: entry[key] for entry in self.history if key in entry and x in entry}
        return np.array(list(points), dtype=float), np.array(list(points.values()), dtype=float)

    def last(self, key: str) -> float | None:
        """A logged number's last value."""
        values = self.curve(key)[1]
        return float(values[-1]) if len(values) else None

    def speed(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens a second of each logged window, against the epoch it ends at."""
        names = ("epoch", "num_input_tokens_seen", "train_runtime")
        lines = [[entry[name] for name in names] for entry in self.history if set(names) <= set(entry)]
        epochs, tokens, seconds = np.array(lines, dtype=float).reshape(-1, 3).T
        # The clock starts anew with each launch: a window that spans two is left out.
        windows = np.diff(tokens, prepend=0), np.diff(seconds, prepend=0)
        is_whole = (windows[0] > 0) & (windows[1] > 0)
        return epochs[is_whole], windows[0][is_whole] / windows[1][is_whole]


def read_run(folder: str | Path, history: list[dict[str, float]] | None = None) -> Run:
    """Reads an output folder.

    Args:
        folder: Output folder of the run.
        history: The log. Default: from trainer_state.json, there or in the newest checkpoint.

    Raises:
        UserError: No run has started there, or a file of it cannot be read.
    """
    folder = Path(folder)
    if not output.has_started(str(folder)):
        raise UserError(f"{folder}: holds no run (no {output.STARTED}); give the output_dir of one")
    recipe = read_yaml(str(folder / output.STARTED))
    if not isinstance(recipe.get("beta"), int | float):
        raise UserError(f"{folder / output.STARTED}: has no beta; it is no resolved recipe of a run")
    results = _read(folder, output.FINISHED)
    history = _read_history(folder) if history is None else history
    if results and results.get("eval"):  # the last evaluation comes after trainer_state.json
        history = [*history, {"step": max((entry["step"] for entry in history), default=0), **results["eval"]}]
    return Run(
        name=folder.resolve().name,
        recipe=recipe,
        history=history,
        plan=_read(folder, "plan.json") or {},
        data_report=_read(folder, "data_report.json"),
        before=_read(folder, "samples_before.json"),
        after=_read(folder, "samples_after.json"),
        results=results,
        held_out=_read(folder, HELD_OUT),
    )


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads several output folders, under names that tell them apart.

    Raises:
        UserError: As `read_run`.
    """
    runs, paths = [read_run(folder) for folder in folders], [Path(folder).resolve().parts for folder in folders]
    for run, path in zip(runs, paths, strict=True):
        endings = (path[-length:] for length in range(1, len(path)))
        alone = (ending for ending in endings if sum(other[-len(ending) :] == ending for other in paths) == 1)
        run.name = "/".join(next(alone, path[1:]))
    return runs


def _read(folder: Path, name: str) -> Any | None:
    try:
        return read_json(folder / name)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / name}: not valid JSON: {error}; remove the file, or run again") from error


def _read_history(folder: Path) -> list[dict[str, float]]:
    """What the newest trainer_state.json has logged."""
    states = [_read(place, "trainer_state.json") for place in (folder, *list_checkpoints(folder)[-1:])]
    histories = [state["log_history"] for state in states if state]
    return max(histories, key=len, default=[])


def alarm(run: Run) -> str | None:
    """A sentence, where the likelihood of the best responses has fallen below its start, beyond noise; else None.

    The start is zero: the policy begins as the reference. Noise is two standard errors, over the held-out prompts of
    the newest evaluation; without such, over the last windows of training that were logged.
    """
    values, what = _rewards_of_best(run)
    if len(values) < 2:
        return None
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    if not mean + _BEYOND_NOISE * error < 0:  # NaN is no alarm of this kind
        return None
    advice = "Try a smaller learning_rate, or a larger beta"
    if run.recipe.get("loss_type") != "NCA":
        advice += "; NCA is the loss that is to keep it up"
    return (
        f"The likelihood of the best responses is below its start, by {-mean / run.beta:.3g} +- {error / run.beta:.2g} "
        f"nats a response (implicit reward {mean:.3g}, beta {run.beta:g}; {what}). {advice}."
    )


def _rewards_of_best(run: Run) -> tuple[np.ndarray, str]:
    """Implicit rewards of the best responses, by prompt or by window, and what they are of."""
    held_out = np.array(run.held_out["rewards/chosen"] if run.held_out else [], dtype=float)
    if len(held_out):
        return held_out, f"{len(held_out)} held-out prompts, step {run.held_out['step']}"
    windows = run.curve("rewards/chosen")[1][-_WINDOWS:]
    return windows, f"the last {len(windows)} logged windows of training, step {run.step}"


def label(run: Run, runs: Sequence[Run]) -> str:
    """The shortest name that tells a run from the others: its loss, where that does."""
    losses = [str(other.recipe.get("loss_type")) for other in runs]
    return str(run.recipe.get("loss_type")) if len(set(losses)) == len(losses) else run.name
