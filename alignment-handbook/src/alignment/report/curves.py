"""Curves of training: of a run against its epochs, or of groups of runs, each a mean and a band over its seeds."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from alignment.report.axes import COLOURS, GREY, Style, explain_strength, name_at_ends, name_lines, say, style
from alignment.report.groups import Group
from trl_nca.losses import LOSSES

#: Draws something of groups of runs; nothing where they have no numbers for it.
Draw = Callable[[Axes, Sequence[Group]], None]
#: Where a line ends, its name and its colour.
End = tuple[float, float, str, str]


def start_line(axes: Axes) -> None:
    """Draws the line at 0, where the policy is the reference."""
    axes.axhline(0, color=GREY, linewidth=1, linestyle=":")


def plot(axes: Axes, group: Group, key: str, name: str, look: Style, with_training: bool = True) -> list[End]:
    """A held-out curve, strong, and the training curve behind it; returns the end of the line to be named.

    Args:
        axes: Where to.
        group: Of several runs the mean is drawn, and a band from the lowest to the highest.
        key: The logged number.
        name: Of the line.
        look: Of the line.
        with_training: Whether to draw the training curve where there is a held-out one.
    """
    training, held_out = group.curve(key), group.curve(f"eval_{key}")
    ends: list[End] = []
    has_held_out = bool(len(held_out[0]))
    for (epochs, values), measured_on in ((training, "training"), (held_out, "held-out")):
        if not len(epochs) or (measured_on == "training" and has_held_out and not with_training):
            continue
        is_strong = measured_on == "held-out" or not has_held_out
        strength = {"linewidth": 2.0} if is_strong else {"linewidth": 1.0, "alpha": 0.5}
        markers = {"marker": look.marker, "markersize": 3.5} if measured_on == "held-out" else {}
        ends = [line(axes, epochs, values, f"{name}, {measured_on}", look, is_strong, **strength, **markers)]
    return [(x, y, name, colour) for x, y, _, colour in ends]


def line(
    axes: Axes, x: np.ndarray, values: np.ndarray, name: str, look: Style, band: bool = True, **how: object
) -> End:
    """Draws the mean of some runs, and their band. `values` has shape (runs, points)."""
    mean = values.mean(axis=0)
    if band and len(values) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=look.colour, alpha=0.15, linewidth=0)
    axes.plot(x, mean, color=look.colour, linestyle=look.dash, **how)
    spread = [f", {low:.4g} to {high:.4g} over {len(values)} runs" if len(values) > 1 else ""
              for low, high in zip(values.min(axis=0), values.max(axis=0), strict=True)]  # fmt: skip
    what = axes.get_xlabel() or "epoch"
    say(axes, x, mean, [f"{name}, {what} {at:.3g}: {y:.4g}{s}" for at, y, s in zip(x, mean, spread, strict=True)])
    return float(x[-1]), float(mean[-1]), name, look.colour


def logged(
    key: str, ylabel: str, from_zero: bool = False, start: bool = False, limits: tuple[float, float] | None = None
) -> Draw:
    """Draws a number that is logged, a line a group.

    Args:
        key: The logged number.
        ylabel: With the unit.
        from_zero: Whether the axis begins at 0.
        start: Whether to draw a line at 0.
        limits: What the number cannot pass, and so the axis does not.
    """

    def draw(axes: Axes, groups: Sequence[Group]) -> None:
        names = [group.name for group in groups]
        ends: list[End] = []
        for index, group in enumerate(groups):
            ends += plot(axes, group, key, group.name, style(index), with_training=name_at_ends(names))
        if not ends:
            return
        if start:
            start_line(axes)
        if from_zero:
            axes.set_ylim(bottom=0)
        if limits:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, limits[0]), min(high, limits[1]))
        against_epoch(axes, ylabel, groups, key)
        name_ends(axes, groups, ends)

    return draw


def against_epoch(axes: Axes, ylabel: str, groups: Sequence[Group], key: str) -> None:
    """Labels the axes, and says which lines are held-out."""
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.set_xlim(left=0)
    are_held_out = [len(group.curve(f"eval_{key}")[0]) > 0 for group in groups]
    if any(are_held_out) and name_at_ends([group.name for group in groups]):
        explain_strength(axes, COLOURS[0] if len(groups) == 1 else GREY)
    elif any(are_held_out):
        what = "held-out" if all(are_held_out) else "held-out, and training where that is all there is"
        axes.set_title(what, fontsize=9, color=GREY, loc="left")


def name_ends(axes: Axes, groups: Sequence[Group], ends: Sequence[End]) -> None:
    """Names the lines of several groups where they end, if there is room; else the page and the files have a legend."""
    if len(groups) > 1 and name_at_ends([group.name for group in groups]):
        name_lines(axes, ends)


def rewards(axes: Axes, groups: Sequence[Group]) -> None:
    """Figure 2 of the paper: the best and the other responses of a run."""
    (group,) = groups
    (run,) = group.runs
    ends = plot(axes, group, "rewards/chosen", "best", Style(COLOURS[0], "-", "o"))
    ends += plot(axes, group, "rewards/rejected", "others", Style(COLOURS[1], "--", "o"))
    if not ends:
        return
    start_line(axes)
    against_epoch(axes, "implicit reward (beta x nats)", groups, "rewards/chosen")
    axes.figure.subplots_adjust(right=0.7)
    name_lines(axes, ends)
    if run.recipe.get("normalize") == "tokens" or getattr(LOSSES.get(run.loss), "per_token", False):
        return  # implicit rewards are of a token
    nats = axes.secondary_yaxis(1.22, functions=(lambda r: r / run.beta, lambda n: n * run.beta))
    nats.set_ylabel("nats gained on the reference")
    nats.spines["right"].set_visible(True)
    nats.spines["right"].set_color("#cccccc")


def ranks(axes: Axes, groups: Sequence[Group]) -> None:
    """The implicit reward by rank of score: over the epoch for a run, at the end for several."""
    ends: list[End] = []
    is_single = len(groups) == len(groups[0].runs) == 1
    axes.set_xlabel("epoch" if is_single else "rank of score, 1 is best")
    for index, group in enumerate(groups):
        part = "eval_" if group.runs[0].last("eval_rewards/rank_0") is not None else ""
        curves = []
        while len((curve := group.curve(f"{part}rewards/rank_{len(curves)}"))[0]):
            curves.append(curve)
        if not curves:
            continue
        if is_single:
            ends = _ranks_of_run(axes, curves, part)
            continue
        at_end = np.stack([values[:, -1] for _, values in curves], axis=1)  # (runs, ranks)
        look = style(index)
        places = np.arange(1.0, len(curves) + 1)
        ends.append(line(axes, places, at_end, group.name, look, linewidth=2, marker=look.marker, markersize=4))
    if not ends:
        return
    start_line(axes)
    if is_single:
        axes.set_xlim(left=0)
        name_lines(axes, ends)
    else:
        axes.set_ylabel("implicit reward at the end")
        axes.xaxis.get_major_locator().set_params(integer=True)
        name_ends(axes, groups, ends)


def _ranks_of_run(axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], part: str) -> list[End]:
    ends = []
    for rank, (epochs, values) in enumerate(curves):
        name = "best" if rank == 0 else f"{rank + 1}."
        look = Style(COLOURS[rank % len(COLOURS)], "-" if rank < len(COLOURS) else "--", "o")
        how = {"linewidth": 1.8, "markersize": 3, "marker": "o" if part else None}
        ends.append(line(axes, epochs, values, name, look, **how))
    axes.set_ylabel(f"implicit reward, {'held-out' if part else 'training'}")
    return ends


def speed(axes: Axes, groups: Sequence[Group]) -> None:
    """Tokens a second of each logged window."""
    ends = []
    for index, group in enumerate(groups):
        epochs, rates = group.speed()
        if len(epochs):
            ends.append(line(axes, epochs, rates, group.name, style(index), linewidth=1.5))
    if ends:
        axes.set_ylim(bottom=0)
        axes.set(xlabel="epoch", ylabel="tokens trained on a second")
        axes.set_xlim(left=0)
        name_ends(axes, groups, ends)
