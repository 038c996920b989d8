"""The pages of `benchmarks.figure2`: figures with bands over seeds, tables, and what they come to.

Every word that depends on a number is computed from it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignment.report.axes import COLOURS, GREY, name_lines, tidy
from alignment.report.groups import Estimate
from alignment.report.runs import Run
from alignment.sweep.paired import estimate
from benchmarks.claims import above_zero, claims, verdict
from benchmarks.pages import save_figure, table, write_page

PANELS = [
    ("eval_rewards/chosen", "best response"),
    ("eval_rewards/rejected", "other responses"),
    ("eval_rewards/margins", "margin: best less others"),
]
#: The loss that NCA is compared with, by form of the data: what DPO is called with more than two responses is InfoNCA.
OTHER = {"pairs": "DPO", "rewards": "InfoNCA"}
_FORM = "+.3f"
_COLOUR = {"NCA": COLOURS[0], "DPO": COLOURS[1], "InfoNCA": COLOURS[1]}
_RESPONSES = {"pairs": "best and worst response", "rewards": "all responses"}

Found = Mapping[tuple[str, str], Sequence[Run]]
#: Key, value and loss.
Place = tuple[str, float, str]
Swept = Mapping[Place, Sequence[Run]]


def write_figure2(found: Found, command: str, jobs: int, docs: Path) -> Path:
    """Writes figure2.md and figures/figure2.png.

    Args:
        found: The runs, one a seed, by form of the data and loss.
        command: That made them.
        jobs: Runs at a time.
        docs: Folder of the page.

    Returns:
        The page.
    """
    save_figure(_draw_curves(found), docs, "figure2.png")
    parts = [
        "# Figure 2 of the paper, small",
        "The paper's Figure 2 says: under DPO the likelihood of the chosen responses falls, under NCA it does not, and "
        "DPO's margin is the larger. Here that is put to the test on a small model, with held-out prompts.",
        _how(found, command, jobs),
        "![Implicit reward against the epoch](figures/figure2.png)",
        "Lines are means over the held-out prompts and the seeds, bands reach from the lowest seed to the highest. At "
        "the start each implicit reward is 0 by definition: the policy is the reference.",
        "The settings were chosen on pilots with the first seed, as those that tell the losses apart in so few steps: "
        "with `beta: 0.1`, implicit rewards stay so near 0 that all losses' gradients point the same way.",
        "## Verdict",
        *(_verdict_on(data, found) for data in OTHER),
        "The margin is taken to the mean of the other responses. Intervals (95 %) are bootstraps that draw seeds and "
        "held-out prompts, the same ones for both losses; with one seed they say nothing of other seeds. A claim holds "
        "where its interval is above zero, or below for a loss of likelihood; that there is no loss is taken to hold "
        "where the interval is not below zero, which is no proof that there is none.",
        "## At the end of the runs",
        _table_of_ends(found),
    ]
    return write_page(docs / "figure2.md", parts)


def _how(found: Mapping, command: str, jobs: int) -> str:
    """The settings that all runs share, the command and the time."""
    runs = list({id(run): run for group in found.values() for run in group}.values())
    recipe, seconds = runs[0].recipe, np.mean([run.results["seconds"] for run in runs])
    names = ("model_name_or_path", "beta", "alpha", "learning_rate", "max_steps", "global_batch_size", "lora_r")
    same = [name for name in names if len({str(run.recipe.get(name)) for run in runs}) == 1 and name in recipe]
    settings = ", ".join(f"`{name}: {recipe[name]}`" for name in same)
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.recipe["seed"] for run in runs))
    prompts = len(runs[0].held_out["rewards/chosen"])
    return (
        f"```\n{command}\n```\n\n{len(runs)} runs of {seconds / 60:.1f} minutes by their own clocks, {jobs} at a time "
        f"on {os.cpu_count()} CPU cores. In all of them {settings}; seeds {seeds}; {prompts} held-out prompts."
    )


def _verdict_on(data: str, found: Found) -> str:
    other = OTHER[data]
    runs = {loss: found[data, loss] for loss in ("NCA", other)}
    best = {loss: _of_prompts(group, "rewards/chosen") for loss, group in runs.items()}
    margins = {loss: best[loss] - _of_prompts(group, "rewards/rejected") for loss, group in runs.items()}
    tested = claims(best, margins, other)
    rows = [(claim.text, claim.answer, claim.estimate.text(_FORM)) for claim in tested]
    shown = table(("claim", "holds", "implicit reward (95 %)"), rows)
    return f"### {data.capitalize()} ({_RESPONSES[data]}): NCA and {other}\n\n**{verdict(tested)}**\n\n{shown}"


def _of_prompts(runs: Sequence[Run], name: str) -> np.ndarray:
    """A number of each held-out prompt at the end of each run. Shape (S, P)."""
    return np.array([run.held_out[name] for run in runs], dtype=float)


def _table_of_ends(found: Found) -> str:
    rows = []
    for (data, loss), runs in found.items():
        best, rest = (_of_prompts(runs, f"rewards/{part}") for part in ("chosen", "rejected"))
        numbers = (best, best / runs[0].beta, rest, best - rest, _of_prompts(runs, "rewards/accuracies"))
        seconds = np.mean([run.results["seconds"] for run in runs])
        rows.append((data, loss, *(estimate(values).text(_FORM) for values in numbers), f"{seconds:.0f}"))
    return table(("data", "loss", "best", "best, nats", "others", "margin", "accuracy", "seconds a run"), rows)


def _draw_curves(found: Found) -> Figure:
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    grid = figure.subplots(len(OTHER), len(PANELS), squeeze=False, sharex=True)
    for row, data in zip(grid, OTHER, strict=True):
        for axes, (key, title) in zip(row, PANELS, strict=True):
            tidy(axes)
            axes.axhline(0, color=GREY, linewidth=1, linestyle=":")
            axes.set_title(f"{data}: {title}", fontsize=10, loc="left")
            ends = [_band(axes, runs, key, loss) for (of, loss), runs in found.items() if of == data]
            name_lines(axes, ends)
            axes.set_xlim(left=0)
        row[0].set_ylabel("implicit reward, held-out")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    return figure


def _band(axes: Axes, runs: Sequence[Run], key: str, loss: str) -> tuple[float, float, str, str]:
    """The mean over the seeds, and from the lowest to the highest; returns the end of the line to be named."""
    epochs = np.r_[0, runs[0].curve(key)[0]]
    values = np.array([np.r_[0, run.curve(key)[1]] for run in runs])  # (S, evaluations)
    colour, style = _COLOUR[loss], "-" if loss == "NCA" else "--"
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.plot(epochs, values.mean(axis=0), color=colour, linestyle=style, linewidth=2)
    return float(epochs[-1]), float(values[:, -1].mean()), loss, colour


def write_sweep(found: Swept, command: str, jobs: int, docs: Path) -> Path:
    """Writes sweep.md and figures/sweep.png.

    Args:
        found: The runs, one a seed, by key, value and loss.
        command: That made them.
        jobs: Runs at a time.
        docs: Folder of the page.

    Returns:
        The page.
    """
    keys = list(dict.fromkeys(key for key, _, _ in found))
    save_figure(_draw_sweep(found, keys), docs, "sweep.png")
    parts = [
        "# Ablations",
        "One key at a time, on the reward data; all runs are measured on all responses of the same held-out prompts. "
        "`num_responses` takes so many of a training row's, spread from best to worst; the most is all of them.",
        _how(found, command, jobs),
        "![Held-out results by value of the keys](figures/sweep.png)",
        "Lines are means over the held-out prompts and the seeds, bands reach from the lowest seed to the highest.",
        "## From the smallest value to the largest",
        table(
            ("key", "from", "to", "loss", "best, nats", "margin, nats", "accuracy", "accuracy rises"),
            [_change(found, key, loss) for key in keys for loss in ("NCA", "InfoNCA")],
        ),
        "Differences by seed and held-out prompt, with their bootstrap intervals (95 %).",
        "## At each value",
        table(
            ("key", "value", "loss", "best, nats", "margin, nats", "accuracy"),
            [_at(runs, *place) for place, runs in found.items()],
        ),
    ]
    return write_page(docs / "sweep.md", parts)


def _at(runs: Sequence[Run], key: str, value: float, loss: str) -> tuple[str, ...]:
    return key, f"{value:g}", loss, *(estimate(values).text(_FORM) for values in _measures(runs).values())


def _measures(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Each of shape (S, P)."""
    best, rest = (_of_prompts(runs, f"rewards/{part}") / runs[0].beta for part in ("chosen", "rejected"))
    return {"best, nats": best, "margin, nats": best - rest, "accuracy": _of_prompts(runs, "rewards/accuracies")}


def _values(found: Swept, key: str) -> list[float]:
    return sorted({value for of, value, _ in found if of == key})


def _change(found: Swept, key: str, loss: str) -> tuple[str, ...]:
    values = _values(found, key)
    first, last = (_measures(found[key, value, loss]) for value in (values[0], values[-1]))
    changes: list[Estimate] = [estimate(last[name] - first[name]) for name in first]
    return (
        key,
        f"{values[0]:g}",
        f"{values[-1]:g}",
        loss,
        *(change.text(_FORM) for change in changes),
        above_zero(changes[-1]),
    )


def _draw_sweep(found: Swept, keys: Sequence[str]) -> Figure:
    names = list(_measures(next(iter(found.values()))))
    figure = Figure(figsize=(11, 3.1 * len(keys)), layout="constrained")
    for row, key in zip(figure.subplots(len(keys), len(names), squeeze=False), keys, strict=True):
        values = _values(found, key)
        for axes, name in zip(row, names, strict=True):
            tidy(axes)
            ends = []
            for loss in ("NCA", "InfoNCA"):
                means = np.array([_measures(found[key, value, loss])[name].mean(axis=1) for value in values])  # (V, S)
                places, colour = range(len(values)), _COLOUR[loss]
                axes.fill_between(places, means.min(axis=1), means.max(axis=1), color=colour, alpha=0.18, linewidth=0)
                style = "-" if loss == "NCA" else "--"
                axes.plot(places, means.mean(axis=1), color=colour, linestyle=style, marker="o", linewidth=2)
                ends.append((float(places[-1]), float(means[-1].mean()), loss, colour))
            name_lines(axes, ends)
            axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            axes.set(xlabel=key, ylabel=f"{name}, held-out")
    return figure
