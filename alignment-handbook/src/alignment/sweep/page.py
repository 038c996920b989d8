"""What a sweep says of its runs: a line for each as it ends, and one page on all."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignment.report.groups import MEASURES, Group, measure
from alignment.report.html import report_comparison
from alignment.report.numbers import write_numbers
from alignment.report.runs import Run, read_run
from alignment.sweep.commands import Planned

PAGE = "sweep.html"


def run_line(run: Run) -> str:
    """The main numbers of a run that is finished."""
    found = [(name, form, values[~np.isnan(values)]) for name, form in MEASURES.items()
             if len(values := measure(run, name))]  # fmt: skip
    numbers = [f"{name} {values.mean():{form}}" for name, form, values in found if len(values)]
    return "  ".join([*numbers, f"{run.results['seconds']:.0f} s" if run.results else ""])


def group_arms(planned: Sequence[Planned]) -> list[Group]:
    """The finished runs by arm, in the order of the arms."""
    found: dict[str, list[Run]] = {}
    for one in planned:
        found.setdefault(one.arm.name, []).append(read_run(one.folder))
    return [Group(name, runs) for name, runs in found.items()]


def write_page(groups: Sequence[Group], folder: Path) -> Path:
    """Writes the page, and its numbers as CSV.

    Args:
        groups: The runs of each arm, over the same seeds.
        folder: Of the sweep.

    Returns:
        The page.
    """
    report_comparison(groups, folder / PAGE)
    write_numbers(groups, folder)
    return folder / PAGE
