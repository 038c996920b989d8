"""The figures of a report, one a quantity: those of a single run, and those of groups of runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from alignment.files import atomic_path
from alignment.report.axes import add_legend, name_at_ends, new_axes
from alignment.report.curves import Draw, logged, ranks, rewards, speed
from alignment.report.data_figures import draw_ks, draw_lengths, draw_scores, frontier, of_data, sampled_lengths
from alignment.report.groups import Group

_REWARD = "implicit reward (beta x nats)"
_TRAINING: list[tuple[str, str, Draw]] = [
    (
        "accuracy",
        "Accuracy: best preferred to others",
        logged("rewards/accuracies", "share of the others", limits=(0, 1)),
    ),
    ("loss", "Loss", logged("loss", "loss (nats a prompt)")),
    ("entropy", "Entropy of the responses' tokens", logged("entropy", "entropy (nats a token)")),
    (
        "token_accuracy",
        "Token accuracy: best responses",
        logged("mean_token_accuracy", "share of the tokens", limits=(0, 1)),
    ),
    ("learning_rate", "Learning rate", logged("learning_rate", "learning rate", from_zero=True)),
    ("grad_norm", "Gradient norm", logged("grad_norm", "norm before clipping", from_zero=True)),
    ("speed", "Speed", speed),
]
#: File, title and drawing of each figure of a single run.
_SINGLE_RUN: list[tuple[str, str, Draw]] = [
    ("rewards", "Relative likelihood: best and others", rewards),
    ("margin", "Margin: best less others", logged("rewards/margins", _REWARD, start=True)),
    ("ranks", "Implicit reward by rank of score", ranks),
    *_TRAINING,
    ("lengths", "Length against score, training data", of_data(draw_lengths)),
    ("sampled_lengths", "Length against score, sampled answers", sampled_lengths),
    ("scores", "Scores, training data", of_data(draw_scores)),
    ("responses", "Responses in a row, training data", of_data(draw_ks)),
]
#: The same of several runs.
_SIDE_BY_SIDE: list[tuple[str, str, Draw]] = [
    ("frontier", "Held-out score against KL from the reference", frontier),
    ("best", "Relative likelihood of the best responses", logged("rewards/chosen", _REWARD, start=True)),
    ("others", "Relative likelihood of the others", logged("rewards/rejected", _REWARD, start=True)),
    ("margin", "Margin: best less others", logged("rewards/margins", _REWARD, start=True)),
    ("ranks", "Implicit reward by rank of score", ranks),
    *_TRAINING,
]


class Drawn(NamedTuple):
    """A figure: the name of its file, its title, and its axes."""

    name: str
    title: str
    axes: Axes


def draw_all(groups: Sequence[Group]) -> list[Drawn]:
    """Draws all that the runs have numbers for, in the order of a report.

    Losses of different kinds are no quantity to compare: of them nothing is drawn.

    Args:
        groups: A single run's, or those to compare.
    """
    is_single = len(groups) == len(groups[0].runs) == 1
    beside = name_at_ends([group.name for group in groups]) and len(groups) > 1
    drawn = []
    for name, title, draw in _SINGLE_RUN if is_single else _SIDE_BY_SIDE:
        if name == "loss" and len({group.runs[0].loss for group in groups}) > 1:
            continue
        axes = new_axes(right=0.74) if beside else new_axes()
        draw(axes, groups)
        if axes.has_data():
            drawn.append(Drawn(name, title, axes))
    return drawn


def save_all(drawn: Sequence[Drawn], folder: Path, names: Sequence[str] = (), file_format: str = "png") -> None:
    """Writes the figures, each whole or not at all.

    Args:
        drawn: From `draw_all`.
        folder: Made where it is not there.
        names: Of the groups, for a legend where the lines are not named.
        file_format: png, pdf or svg.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, _, axes in drawn:
        has_legend = len(names) > 1 and not name_at_ends(names)
        if has_legend:
            add_legend(axes, names)
        with atomic_path(folder / f"{name}.{file_format}") as partial:
            tight = {"bbox_inches": "tight"} if has_legend else {}
            axes.figure.savefig(partial, dpi=170, format=file_format, **tight)


def remove_others(drawn: Sequence[Drawn], folder: Path) -> None:
    """Removes from a run's folder of figures those that an earlier run left there and this one does not have."""
    for name in {name for name, _, _ in _SINGLE_RUN} - {figure.name for figure in drawn}:
        (folder / f"{name}.png").unlink(missing_ok=True)
