"""Groups of runs that differ in their seed alone: names, curves over the seeds, and numbers with their intervals."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from alignment.evaluation.held_out import bootstrap_interval, prompt_kls, prompt_means, with_scores
from alignment.evaluation.length_control import control_length, control_length_interval
from alignment.report.runs import Run

#: Keys that say which of several equal runs it is, and where its files lie.
_NOT_SETTINGS = (
    "seed data_seed output_dir run_name logging_dir hub_model_id ref_logps_dir samples_before_dir project "
    "trackio_space_id"
).split()
#: Student's t at 97.5 %, by degrees of freedom from 1; the last one stands for all that are more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
      2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


class Estimate(NamedTuple):
    """A mean and its 95 % interval; NaN bounds where none is known."""

    mean: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """Both in one form, as `0.517 [0.463, 0.572]`."""
        mean, low, high = (format(value, form) for value in self)
        return mean if np.isnan(self.low) else f"{mean} [{low}, {high}]"


@dataclass
class Group:
    """Runs of the same settings.

    Attributes:
        name: What tells it from the other groups.
        runs: At least one.
    """

    name: str
    runs: list[Run]

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """A logged number at the epochs that all runs have logged, from the start on. Shapes (T,) and (runs, T)."""
        curves = [dict(zip(*map(np.ndarray.tolist, run.curve_from_start(key)), strict=True)) for run in self.runs]
        epochs = sorted(set.intersection(*map(set, curves)))
        values = [[curve[epoch] for epoch in epochs] for curve in curves]
        return np.array(epochs, dtype=float), np.array(values, dtype=float).reshape(len(curves), len(epochs))

    def speed(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens a second of the first run's windows, and of each run at them. Shapes (T,) and (runs, T)."""
        speeds = [run.speed() for run in self.runs]
        length = min(len(rates) for _, rates in speeds)
        return speeds[0][0][:length], np.array([rates[:length] for _, rates in speeds])

    def estimate(self, name: str) -> Estimate | None:
        """A number of `MEASURES` over the runs, with its interval; None where no run has it.

        Over several runs it is Student's interval of their mean: that of other seeds. Of a single run it is a
        bootstrap over its held-out prompts.
        """
        found = {i: values[~np.isnan(values)] for i, values in enumerate(measure(run, name) for run in self.runs)}
        found = {i: values for i, values in found.items() if len(values)}
        if not found:
            return None
        if len(found) > 1:
            return _student(np.array([values.mean() for values in found.values()]))
        ((i, values),) = found.items()
        return Estimate(float(values.mean()), *_bounds(self.runs[i], name, values))


def _student(means: np.ndarray) -> Estimate:
    half = _T[min(len(means) - 1, len(_T)) - 1] * means.std(ddof=1) / np.sqrt(len(means))
    return Estimate(float(means.mean()), float(means.mean() - half), float(means.mean() + half))


def _bounds(run: Run, name: str, values: np.ndarray) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan
    if name == _CONTROLLED:  # whose slope is of these prompts too
        return control_length_interval(*with_scores(run.before or [], run.after or []))
    return bootstrap_interval(values)


_CONTROLLED = "gain at the start's length"
#: Name with its unit, and format, of the numbers at the end of a run that are compared.
MEASURES = {
    "held-out score": ".3f",
    "gain in score": "+.3f",
    _CONTROLLED: "+.3f",
    "KL (nats)": "z.2f",
    "accuracy (share)": ".3f",
    "best (nats)": "+.2f",
    "margin (reward)": "+.3f",
    "loss (nats a prompt)": ".4f",
}
#: Logged names of some of them.
_LOGGED = {"accuracy (share)": "rewards/accuracies", "margin (reward)": "rewards/margins",
           "loss (nats a prompt)": "loss"}  # fmt: skip


def _gains(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> np.ndarray:
    return prompt_means(after) - prompt_means(before) if len(before) == len(after) else np.array([])


def _controlled(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> np.ndarray:
    both = with_scores(before, after)
    return control_length(*both) if both[0] else np.array([])


#: Of samples before and after training: a number of each prompt.
_OF_SAMPLES = {
    "held-out score": lambda before, after: prompt_means(after),
    "gain in score": _gains,
    _CONTROLLED: _controlled,
    "KL (nats)": lambda before, after: prompt_kls(after),
}


def measure(run: Run, name: str) -> np.ndarray:
    """A number of `MEASURES`: of each held-out prompt; else one value, the last that was logged; or none."""
    if name in _OF_SAMPLES:
        return _OF_SAMPLES[name](run.before or [], run.after or [])
    if name == "best (nats)":
        of_prompts = run.gained_by_best(run.of_prompts)
        last = run.gained_by_best(run.last, "eval_" if run.last("eval_loss") is not None else "")
        return of_prompts if len(of_prompts) else np.array([] if last is None else [last])
    of_prompts = run.of_prompts(_LOGGED[name])
    if name == "margin (reward)":
        best, rest = run.of_prompts("rewards/chosen"), run.of_prompts("rewards/rejected")
        of_prompts = best - rest if len(best) == len(rest) else of_prompts
    if len(of_prompts):
        return of_prompts
    part = "eval_" if run.last("eval_loss") is not None else ""
    value = run.last(part + _LOGGED[name])
    return np.array([] if value is None else [value])


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs whose recipes differ in the seed and in names of folders alone, in the order of their first runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(settings(run), sort_keys=True, default=str), []).append(run)
    members = list(found.values())
    return [Group(name, group) for name, group in zip(_names(members), members, strict=True)]


def settings(run: Run) -> dict[str, object]:
    """The recipe without what says which of several equal runs it is."""
    return {key: value for key, value in run.recipe.items() if key not in _NOT_SETTINGS}


def _names(members: Sequence[Sequence[Run]]) -> list[str]:
    """The shortest names that tell groups apart: the loss; settings that differ, up to two; folders."""
    losses = [group[0].loss for group in members]
    if len(set(losses)) == len(losses):
        return losses
    recipes = [settings(group[0]) for group in members]
    differing = [key for key in dict.fromkeys(["loss_type", *(key for recipe in recipes for key in recipe)])
                 if len({str(recipe.get(key)) for recipe in recipes}) > 1]  # fmt: skip
    if len(differing) <= 2:
        return [", ".join(_setting(key, recipe.get(key, "-")) for key in differing) for recipe in recipes]
    folders = [_shared_name([run.name for run in group]) for group in members]
    if len(set(folders)) == len(folders) and all(folders):
        return folders
    return [group[0].name for group in members]


def _setting(key: str, value: object) -> str:
    return str(value) if key == "loss_type" else f"{key} {value}"


def _shared_name(names: Sequence[str]) -> str:
    """What the names of a group's folders begin with, without what counts its seeds."""
    return (
        names[0] if len(names) == 1 else os.path.commonprefix(names).rstrip("/-_. ").removesuffix("seed").rstrip("/-_")
    )


def held_out_rows(run: Run) -> str:
    """The held-out rows in words: `55 prompts, K 4-6`; "-" where there are none."""
    report = (run.data_report or {}).get("eval") or {}
    ks = sorted(map(int, report.get("k_histogram") or {}))
    if not ks:
        return "-"
    return f"{report.get('rows_kept', '?')} prompts, K {ks[0] if len(ks) == 1 else f'{ks[0]}-{ks[-1]}'}"


def warnings(groups: Sequence[Group]) -> list[str]:
    """What forbids to compare numbers of the groups: held-out rows that are not the same."""
    found: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        for run in group.runs:
            scores = ((run.data_report or {}).get("eval") or {}).get("scores") or {}
            key = (held_out_rows(run), f"{scores.get('mean')}")
            found.setdefault(key, []).append(group.name)
    if len(found) < 2:
        return []
    sets = "; ".join(f"{rows} ({', '.join(dict.fromkeys(names))})" for (rows, _), names in found.items())
    if _have_same_best([run for group in groups for run in group.runs]):
        return [
            f"Not measured on the same responses of the held-out prompts: {sets}. Accuracy, margin and loss cannot be "
            "compared across them; what is of samples or of the best responses can."
        ]
    return [f"Not measured on the same held-out rows, so numbers cannot be compared across them: {sets}."]


def _have_same_best(runs: Sequence[Run]) -> bool:
    """Whether the held-out rows of all runs have the same best responses, as far as their likelihood tells."""
    counts = {((run.data_report or {}).get("eval") or {}).get("rows_kept") for run in runs}
    starts = [run.start_of_best("eval_") for run in runs]
    if len(counts) > 1 or None in starts:
        return False
    return float(np.ptp(starts)) <= 5e-3 * abs(float(np.mean(starts)))


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Keys of the recipes that are not the same in all groups, and their values by group."""
    recipes = [{key: as_text(value) for key, value in settings(group.runs[0]).items()} for group in groups]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [recipe.get(key, "-") for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def as_text(value: object) -> str:
    """A setting as it stands in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)
