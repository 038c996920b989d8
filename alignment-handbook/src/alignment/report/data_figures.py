"""Figures of data and of samples: scores, responses a row, and length against score."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignment.evaluation.held_out import prompt_means
from alignment.report.axes import COLOURS, GREY, mark, name_at_ends, say, style, tidy
from alignment.report.groups import Estimate, Group, measure

_COLOUR = COLOURS[0]


def draw_scores(axes: Axes, report: dict[str, Any]) -> None:
    """The distribution of the scores in a data report."""
    histogram = report["scores"]["histogram"]
    edges = histogram["edges"]
    widths = np.diff(edges)
    bars = axes.bar(edges[:-1], histogram["counts"], width=widths, align="edge", color=_COLOUR, linewidth=0)
    for bar, low, high, count in zip(bars, edges, edges[1:], histogram["counts"], strict=False):
        mark(bar, [f"score {low:.3g} to {high:.3g}: {count} responses"])
    axes.set(xlabel="score", ylabel="responses")


def draw_ks(axes: Axes, report: dict[str, Any]) -> None:
    """The rows by number of responses in a data report."""
    histogram = report["k_histogram"]
    for bar, (k, count) in zip(axes.bar([*histogram], [*histogram.values()], color=_COLOUR), histogram.items(),
                               strict=True):  # fmt: skip
        mark(bar, [f"{k} responses: {count} rows"])
    axes.set(xlabel="responses in a row", ylabel="rows")


def draw_data_report(report: dict[str, Any], file: Path) -> None:
    """Draws scores, rows by K and lengths by score of a data report, without a run, as a PNG."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, draw_part in zip(figure.subplots(1, 3), (draw_scores, draw_ks, draw_lengths), strict=True):
        tidy(axes)
        draw_part(axes, report)
    figure.savefig(file, dpi=150)


def of_data(draw: Callable[[Axes, dict[str, Any]], None]) -> Callable[[Axes, Sequence[Group]], None]:
    """The same of a run, where it has a data report."""

    def draw_if_there(axes: Axes, groups: Sequence[Group]) -> None:
        report = groups[0].runs[0].data_report
        if report:
            draw(axes, report)

    return draw_if_there


def draw_lengths(axes: Axes, report: dict[str, Any]) -> None:
    """The length of responses by their score: a reward that likes long answers shows here."""
    bins = report["scores"].get("length_by_score")
    if not bins:
        return
    unit = report["lengths"]["unit"]
    axes.plot(bins["score"], bins["length"], color=_COLOUR, marker="o", markersize=4, linewidth=1.2)
    pairs = zip(bins["score"], bins["length"], strict=True)
    texts = [f"score {score:.3g}: {length:.1f} {unit}" for score, length in pairs]
    say(axes, np.array(bins["score"]), np.array(bins["length"]), texts)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="score", ylabel=f"mean length ({unit})")
    correlation = report["scores"].get("length_correlation")
    if correlation is not None:
        title = f"correlation inside a row: {correlation:+.2f}"
        axes.set_title(title, fontsize=9, color=GREY, loc="left")


def sampled_lengths(axes: Axes, groups: Sequence[Group]) -> None:
    """Score and length of each sampled answer, before and after training."""
    (run,) = groups[0].runs
    for name, colour, marker, rows in (("before", GREY, "o", run.before), ("after", _COLOUR, "^", run.after)):
        pairs = [pair for row in rows or [] for pair in zip(row["scores"], row["samples"], strict=True)]
        points = [(score, len(text.split())) for score, text in pairs if score is not None]
        if points:
            scores, words = zip(*points, strict=True)
            dots = axes.scatter(scores, words, s=16, color=colour, marker=marker, alpha=0.5, linewidths=0, label=name)
            mark(dots, [f"{name}: score {score:.3g}, {count} words" for score, count in points])
    if not axes.collections:
        return
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="score of a sampled answer", ylabel="length (words)")


def frontier(axes: Axes, groups: Sequence[Group]) -> None:
    """The held-out score against the divergence that it took: a point a group, and small ones of its runs."""
    found = [(i, group, *map(group.estimate, ("KL (nats)", "held-out score"))) for i, group in enumerate(groups)]
    found = [point for point in found if None not in point]
    if not found:
        return
    _start(axes, groups)
    for i, group, kl, score in found:
        look = style(i)
        point, *_ = axes.errorbar(kl.mean, score.mean, xerr=_reach(kl), yerr=_reach(score), fmt=look.marker,
                                  markersize=7, color=look.colour, linewidth=1)  # fmt: skip
        point.set_label(group.name)  # of the point alone, without its bars
        mark(point, [f"{group.name}: score {score.text('.3f')}, KL {kl.text('z.2f')}"])
        if len(group.runs) > 1:
            _runs(axes, group, look.marker, look.colour)
    axes.set(xlabel="KL from the reference (nats)", ylabel="held-out score")
    if name_at_ends([group.name for group in groups]):
        legend = axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.3)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _start(axes: Axes, groups: Sequence[Group]) -> None:
    """The score of the samples before training, where there is no divergence."""
    scores = [np.nanmean(prompt_means(run.before)) for group in groups for run in group.runs if run.before]
    if scores:
        axes.axhline(np.mean(scores), color=GREY, linewidth=1, linestyle=":")
        (point,) = axes.plot(0, np.mean(scores), color=GREY, marker="o", linestyle="", markersize=7, label="start")
        mark(point, [f"start: score {np.mean(scores):.3f}"])


def _runs(axes: Axes, group: Group, marker: str, colour: str) -> None:
    points = [[np.nanmean(measure(run, name)) for name in ("KL (nats)", "held-out score")]
              for run in group.runs if len(measure(run, "KL (nats)"))]  # fmt: skip
    kls, scores = zip(*points, strict=True)
    axes.scatter(kls, scores, s=12, color=colour, marker=marker, alpha=0.5, linewidths=0)
    texts = [f"{group.name}, a run: score {score:.3f}, KL {kl:z.2f}" for kl, score in points]
    say(axes, np.array(kls), np.array(scores), texts)


def _reach(estimate: Estimate) -> list[list[float]] | None:
    """How far an interval reaches below and above its mean; None where it is not known."""
    below, above = estimate.mean - estimate.low, estimate.high - estimate.mean
    return None if np.isnan(below) else [[below], [above]]
