"""What a sweep says of its runs: a line for each as it ends, and one page on all."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignment.errors import UserError, did_you_mean
from alignment.report.groups import MEASURES, Group, measure
from alignment.report.html import Table, report_comparison
from alignment.report.numbers import write_numbers
from alignment.report.runs import Run, read_run
from alignment.report.tables import aligned, runs_table
from alignment.sweep.commands import Planned
from alignment.sweep.paired import about_differences, difference_rows

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


def choose_baseline(names: Sequence[str], wanted: str | None) -> str:
    """The arm that the others are compared with: the wanted one, or the first.

    Raises:
        UserError: There is no such arm.
    """
    if wanted is not None and wanted not in names:
        raise UserError(
            f"--baseline: there is no arm {wanted!r}; {did_you_mean(wanted, names) or f'choose one of {names}'}"
        )
    return wanted or names[0]


def write_page(groups: Sequence[Group], baseline: str, folder: Path) -> str:
    """Writes sweep.html and its numbers as CSV.

    Args:
        groups: The runs of each arm, over the same seeds.
        baseline: Name of the arm that the others are compared with.
        folder: Of the sweep.

    Returns:
        The same as text, for a terminal.
    """
    (compared_with,) = (group for group in groups if group.name == baseline)
    rows, note = difference_rows(groups, compared_with), about_differences(compared_with)
    title = f"Differences from {baseline}"
    report_comparison(groups, folder / PAGE, [Table(title, rows, note)] if rows else [])
    write_numbers(groups, folder)
    parts = [runs_table(groups)]
    if rows:
        parts.append("\n".join([aligned([[title, *rows[0][1:]], *rows[1:]]), *textwrap.wrap(note, 120)]))
    return "\n\n".join([*parts, f"report  {folder / PAGE}"])
