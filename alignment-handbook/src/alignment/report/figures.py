"""Draws figures of runs, one a quantity: the same for a single run and for several side by side.

Nothing here touches pyplot, whose state and backend belong to the program that trains.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignment.files import atomic_path
from alignment.report.runs import Run, label

#: Okabe and Ito's colours, those dark enough for print: told apart by colour-blind readers, and by lightness in grey.
COLOURS = ("#0072B2", "#D55E00", "#007a5a", "#8a4a76", "#7a6a00", "#333333")
GREY = "#777777"
#: Best and other responses of a single run.
_BEST, _REST = COLOURS[:2]

Draw = Callable[[Axes, Sequence[Run]], None]


def draw_all(runs: Sequence[Run], folder: Path) -> list[tuple[str, Path]]:
    """Draws all that the runs have numbers for.

    Args:
        runs: One, or those to compare.
        folder: Where the PNGs go; made where it is not there.

    Returns:
        Title and file of each figure, in the order of a report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, title, draw in _SINGLE_RUN if len(runs) == 1 else _SIDE_BY_SIDE:
        axes = new_axes() if len(runs) == 1 else new_axes(right=0.74)
        draw(axes, runs)
        file = folder / f"{name}.png"
        if axes.has_data():
            save(axes, file)
            drawn.append((title, file))
        else:  # of an earlier run in this folder
            file.unlink(missing_ok=True)
    return drawn


def new_axes(right: float = 0.89) -> Axes:
    """Makes empty axes, of a width that stays readable on a phone.

    Margins are fixed: finding them takes matplotlib three times as long, too long for a run that draws while it trains.

    Args:
        right: Where the axes end, in parts of the figure's width: names of lines stand beside them.
    """
    figure = Figure(figsize=(4.7, 3.2))
    figure.subplots_adjust(left=0.17, right=right, bottom=0.155, top=0.91)
    axes = figure.add_subplot()
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))  # a learning rate has no room for its zeros
    tidy(axes)
    return axes


def tidy(axes: Axes) -> None:
    """Leaves two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def save(axes: Axes, file: Path) -> None:
    """Writes the figure as a PNG, whole or not at all."""
    with atomic_path(file) as partial:
        axes.figure.savefig(partial, dpi=170, format="png")


def name_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names beside the ends of lines, pushed apart where they would meet.

    Args:
        axes: The axes, with the lines drawn.
        ends: x, y, name and colour of each.
    """
    low, high = axes.get_ylim()
    min_gap = 0.075 * (high - low)
    lowest = -np.inf
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + min_gap)
        axes.annotate(
            name if len(name) <= 16 else f"{name[:15]}…", (x, lowest), xytext=(5, 0), textcoords="offset points",
            va="center", color=colour, fontsize=9, parse_math=False, annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(low, max(high, lowest + min_gap / 2))


def _start(axes: Axes) -> None:
    """Draws the line at 0, where the policy is the reference."""
    axes.axhline(0, color=GREY, linewidth=1, linestyle=":")


def _plot(axes: Axes, run: Run, key: str, name: str, colour: str, dashed: bool = False) -> list[tuple]:
    """A held-out curve, strong, and the training curve behind it; returns the end of the line to be named."""
    style = "--" if dashed else "-"
    training, held_out = run.curve(key), run.curve(f"eval_{key}")
    has_both = len(training[1]) and len(held_out[1])
    ends = []
    for (epochs, values), is_strong in ((training, not has_both), (held_out, True)):
        if not len(values):
            continue
        strength = {"linewidth": 2} if is_strong else {"linewidth": 1, "alpha": 0.5}
        marker = {"marker": "o", "markersize": 3.5} if values is held_out[1] else {}
        axes.plot(epochs, values, color=colour, linestyle=style, **strength, **marker)
        ends = [(epochs[-1], values[-1], name, colour)]
    return ends


def _against_epoch(axes: Axes, ylabel: str, runs: Sequence[Run], key: str) -> None:
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.set_xlim(left=0)
    if any(len(run.curve(f"eval_{key}")[0]) for run in runs):
        axes.set_title("strong: held-out    faint: training", fontsize=9, color=GREY, loc="left")


def _logged(key: str, ylabel: str, from_zero: bool = False, start: bool = False) -> Draw:
    """Draws a number that is logged, a line a run."""

    def draw(axes: Axes, runs: Sequence[Run]) -> None:
        ends = []
        for run, colour in zip(runs, _cycle(len(runs)), strict=True):
            ends += _plot(axes, run, key, label(run, runs), colour)
        if not ends:
            return
        if start:
            _start(axes)
        if from_zero:
            axes.set_ylim(bottom=0)
        _against_epoch(axes, ylabel, runs, key)
        if len(runs) > 1:
            name_lines(axes, ends)

    return draw


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _rewards(axes: Axes, runs: Sequence[Run]) -> None:
    """Figure 2 of the paper: the best and the other responses of a run."""
    (run,) = runs
    ends = _plot(axes, run, "rewards/chosen", "best", _BEST)
    ends += _plot(axes, run, "rewards/rejected", "others", _REST, dashed=True)
    if not ends:
        return
    _start(axes)
    _against_epoch(axes, "implicit reward", runs, "rewards/chosen")
    name_lines(axes, ends)
    axes.figure.subplots_adjust(right=0.7)
    nats = axes.secondary_yaxis(1.14, functions=(lambda r: r / run.beta, lambda n: n * run.beta))
    nats.set_ylabel("nats gained on the reference")
    nats.spines["right"].set_visible(True)
    nats.spines["right"].set_color("#cccccc")


def _ranks(axes: Axes, runs: Sequence[Run]) -> None:
    """The implicit reward by rank of score: over the epoch for a run, at the end for several."""
    ends = []
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        part = "eval_" if run.last("eval_rewards/rank_0") is not None else ""
        curves = []
        while len((curve := run.curve(f"{part}rewards/rank_{len(curves)}"))[1]):
            curves.append(curve)
        if not curves:
            continue
        if len(runs) > 1:
            ranks = np.arange(1, len(curves) + 1)
            values = [values[-1] for _, values in curves]
            axes.plot(ranks, values, color=colour, linewidth=2, marker="o", markersize=4)
            ends.append((ranks[-1], values[-1], label(run, runs), colour))
            continue
        for rank, (epochs, values) in enumerate(curves):
            shade = str(0.62 * rank / max(len(curves) - 1, 1))  # black is best
            axes.plot(epochs, values, color=shade, linewidth=1.8, marker="o" if part else None, markersize=3)
            ends.append((epochs[-1], values[-1], "best" if rank == 0 else str(rank + 1), shade))
        measured_on = "held-out" if part else "training"
        axes.set(xlabel="epoch", ylabel=f"implicit reward, {measured_on}")
        axes.set_xlim(left=0)
    if not ends:
        return
    _start(axes)
    if len(runs) > 1:
        axes.set(xlabel="rank of score, 1 is best", ylabel="implicit reward at the end")
        axes.xaxis.get_major_locator().set_params(integer=True)
    name_lines(axes, ends)


def _speed(axes: Axes, runs: Sequence[Run]) -> None:
    ends = []
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        epochs, rates = run.speed()
        if len(rates):
            axes.plot(epochs, rates, color=colour, linewidth=1.5)
            ends.append((epochs[-1], rates[-1], label(run, runs), colour))
    if ends:
        axes.set_ylim(bottom=0)
        axes.set(xlabel="epoch", ylabel="tokens trained on a second")
        axes.set_xlim(left=0)
        if len(runs) > 1:
            name_lines(axes, ends)


def _lengths(axes: Axes, runs: Sequence[Run]) -> None:
    """The length of training responses by their score: a reward that likes long answers shows here."""
    report = runs[0].data_report or {}
    bins = report.get("scores", {}).get("length_by_score")
    if not bins:
        return
    axes.plot(bins["score"], bins["length"], color=_BEST, marker="o", markersize=4, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="score", ylabel=f"mean length ({report['lengths']['unit']})")
    correlation = report["scores"].get("length_correlation")
    if correlation is not None:
        title = f"correlation inside a row: {correlation:+.2f}"
        axes.set_title(title, fontsize=9, color=GREY, loc="left")


def _sampled_lengths(axes: Axes, runs: Sequence[Run]) -> None:
    """Score and length of each sampled answer, before and after training."""
    ends = []
    for name, colour, marker, rows in (
        ("before", GREY, "o", runs[0].before),
        ("after", _BEST, "^", runs[0].after),
    ):
        for row in rows or []:
            pairs = zip(row["scores"], row["samples"], strict=True)
            points = [(score, len(text.split())) for score, text in pairs if score is not None]
            scores, words = zip(*points, strict=True) if points else ((), ())
            axes.scatter(scores, words, s=16, color=colour, marker=marker, alpha=0.5, linewidths=0)
        if rows:
            ends.append((name, colour, marker))
    if not ends:
        return
    for name, colour, marker in ends:
        axes.scatter([], [], s=24, color=colour, marker=marker, label=name)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="score of a sampled answer", ylabel="length (words)")


def draw_scores(axes: Axes, report: dict[str, Any]) -> None:
    """The distribution of the scores in a data report."""
    histogram = report["scores"]["histogram"]
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=_BEST)
    axes.set(xlabel="score", ylabel="responses")


def draw_ks(axes: Axes, report: dict[str, Any]) -> None:
    """The rows by number of responses in a data report."""
    axes.bar(list(report["k_histogram"]), list(report["k_histogram"].values()), color=_BEST)
    axes.set(xlabel="responses in a row", ylabel="rows")


def draw_data_report(report: dict[str, Any], file: Path) -> None:
    """Draws the scores and the rows by K of a data report, without a run, as a PNG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, draw_part in zip(figure.subplots(1, 2), (draw_scores, draw_ks), strict=True):
        tidy(axes)
        draw_part(axes, report)
    figure.savefig(file, dpi=150)


def _of_data(draw: Callable[[Axes, dict[str, Any]], None]) -> Draw:
    def draw_if_there(axes: Axes, runs: Sequence[Run]) -> None:
        if runs[0].data_report:
            draw(axes, runs[0].data_report)

    return draw_if_there


_TRAINING: list[tuple[str, str, Draw]] = [
    ("accuracy", "Accuracy: best preferred to others", _logged("rewards/accuracies", "share of the others")),
    ("loss", "Loss", _logged("loss", "loss (nats a prompt)")),
    ("learning_rate", "Learning rate", _logged("learning_rate", "learning rate", from_zero=True)),
    ("grad_norm", "Gradient norm", _logged("grad_norm", "norm before clipping", from_zero=True)),
    ("speed", "Speed", _speed),
]
#: File, title and drawing of each figure of a single run.
_SINGLE_RUN: list[tuple[str, str, Draw]] = [
    ("rewards", "Relative likelihood: best and others", _rewards),
    ("margin", "Margin: best less others", _logged("rewards/margins", "implicit reward", start=True)),
    ("ranks", "Implicit reward by rank of score", _ranks),
    *_TRAINING,
    ("lengths", "Length against score, training data", _lengths),
    ("sampled_lengths", "Length against score, sampled answers", _sampled_lengths),
    ("scores", "Scores, training data", _of_data(draw_scores)),
    ("responses", "Responses in a row, training data", _of_data(draw_ks)),
]
#: The same of several runs.
_SIDE_BY_SIDE: list[tuple[str, str, Draw]] = [
    ("best", "Relative likelihood of the best responses", _logged("rewards/chosen", "implicit reward", start=True)),
    ("others", "Relative likelihood of the others", _logged("rewards/rejected", "implicit reward", start=True)),
    ("margin", "Margin: best less others", _logged("rewards/margins", "implicit reward", start=True)),
    ("ranks", "Implicit reward by rank of score", _ranks),
    *_TRAINING,
]
