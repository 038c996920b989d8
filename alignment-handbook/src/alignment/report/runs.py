"""Reads a run from its output folder, finished or not: curves, settings and samples."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignment import output
from alignment.errors import UserError
from alignment.files import read_json
from alignment.recipe import read_yaml
from trl_nca.checkpoints import list_checkpoints
from trl_nca.losses import LOSSES

#: Implicit reward of each held-out prompt at the newest evaluation; see `report.callback`.
HELD_OUT = "held_out.json"
#: See `report.environment`.
ENVIRONMENT = "environment.json"


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
        environment: As in environment.json, see `alignment.report.environment`.
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
    environment: dict[str, Any] | None = None

    @property
    def loss(self) -> str:
        """Name of the loss."""
        return str(self.recipe.get("loss_type", "-"))

    @property
    def beta(self) -> float:
        """Implicit rewards are this times nats."""
        return float(self.recipe["beta"])

    @property
    def has_reference(self) -> bool:
        """Whether implicit rewards are against a reference, which the policy is at the start."""
        return not (self.recipe.get("reference_free") or getattr(LOSSES.get(self.loss), "reference_free", False))

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(max((entry["step"] for entry in self.history), default=0))

    def curve(self, key: str, x: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
        """A logged number against the epoch: two arrays of shape (log lines that have it,)."""
        # A final evaluation repeats that of the last step.
        points = {entry[x]: entry[key] for entry in self.history if key in entry and x in entry}
        return np.array(list(points), dtype=float), np.array(list(points.values()), dtype=float)

    def curve_from_start(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The same with the value at step 0, where it is known and not logged."""
        epochs, values = self.curve(key)
        start = self.start(key)
        if start is None or not len(epochs) or epochs[0] <= 0:
            return epochs, values
        return np.r_[0.0, epochs], np.r_[start, values]

    def start(self, key: str) -> float | None:
        """A logged number at step 0, where the policy is the reference; None where that does not decide it."""
        name = key.removeprefix("eval_")
        if not self.has_reference:
            return None
        if name == "loss":
            return start_loss(self, is_held_out=key != name)
        if name == "rewards/accuracies":  # ties, which count a half
            return 0.5
        return 0.0 if name.startswith(("rewards/", "logratios/")) else None

    def last(self, key: str) -> float | None:
        """A logged number's last value; of an evaluation, that at the end of the run, once there is one."""
        at_end = ((self.results or {}).get("eval") or {}).get(key)
        values = self.curve(key)[1]
        if at_end is not None:
            return float(at_end)
        return float(values[-1]) if len(values) else None

    def start_of_best(self, part: str) -> float | None:
        """Log-likelihood of a best response at the start, in nats. `part`: "eval_", or "" in training."""
        logps, gained = self.last(f"{part}logps/chosen"), self.gained_by_best(self.last, part)
        return None if logps is None or gained is None else logps - gained

    def gained_by_best(self, read: Callable[[str], Any], part: str = "") -> Any:
        """What best responses have gained on the reference, in nats.

        Args:
            read: Gives a logged number by its name: `last`, `of_prompts`, or a curve's values.
            part: "eval_", or "" in training.

        Returns:
            What `read` returns; None or nothing where the run has no reference.
        """
        found = read(f"{part}logratios/chosen") if self.has_reference else read("")
        if found is not None and np.size(found):
            return found
        logs_no_ratios = self.has_reference and self.loss in LOSSES
        rewards = read(f"{part}rewards/chosen") if logs_no_ratios else None
        return found if rewards is None or not np.size(rewards) else rewards / self.beta

    def of_prompts(self, name: str) -> np.ndarray:
        """A number of each held-out prompt at the newest evaluation. Shape (prompts,), or (0,) without one."""
        return np.array((self.held_out or {}).get(name, []), dtype=float)

    def speed(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens a second of each logged window, without its evaluations, against the epoch it ends at."""
        names = ("epoch", "num_input_tokens_seen", "train_runtime")
        lines, evaluating = [], 0.0  # seconds, from the start of the run
        for entry in self.history:
            if set(names) <= set(entry):
                lines.append([*(entry[name] for name in names), evaluating])
            evaluating += entry.get("eval_runtime", 0.0)
        epochs, *sums = np.array(lines, dtype=float).reshape(-1, 4).T
        tokens, seconds, evaluations = (np.diff(values, prepend=0) for values in sums)
        # The clock starts anew with each launch: a window that spans two is left out.
        is_whole = (tokens > 0) & (seconds > 0)
        training = np.maximum(seconds - evaluations, 1e-9)
        return epochs[is_whole], (tokens / training)[is_whole]


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
    if results and results.get("eval") and not recipe.get("eval_prompts_in_training"):
        # The last evaluation comes after trainer_state.json. Of other prompts it is no point of the same curve.
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
        environment=_read(folder, ENVIRONMENT),
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


def start_loss(run: Run, is_held_out: bool) -> float | None:
    """The mean loss at step 0, where all implicit rewards are 0; None where scores or unknown numbers decide it."""
    report = run.data_report or {}
    rows = (report.get("eval") if is_held_out else report) or {}
    counts, start = rows.get("k_histogram"), getattr(LOSSES.get(run.loss), "start", None)
    if not counts or start is None or rows.get("weights") or run.recipe.get("margin") or run.recipe.get("sft_weight"):
        return None
    return sum(num_rows * start(int(k)) for k, num_rows in counts.items()) / sum(counts.values())
