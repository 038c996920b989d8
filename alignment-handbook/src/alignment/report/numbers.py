"""Writes the numbers behind the figures as CSV: each logged number of each run, and those of the groups."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.files import atomic_path
from alignment.report.groups import MEASURES, Group


def write_numbers(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Writes numbers.csv (a line a run and step) and groups.csv (a line a group and number).

    Args:
        groups: From `group_runs`.
        folder: Made where it is not there.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "numbers.csv", folder / "groups.csv"
    _write(files[0], logged_rows(groups))
    _write(files[1], group_rows(groups))
    return list(files)


def logged_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What each run has logged, by step; training and an evaluation of the same step share a line."""
    rows = []
    for group in groups:
        for run in group.runs:
            by_step: dict[float, dict[str, Any]] = {}
            for entry in run.history:
                by_step.setdefault(entry["step"], {}).update(entry)
            for step in sorted(by_step):
                about = {"group": group.name, "run": run.name, "seed": run.recipe.get("seed", ""), "step": step}
                rows.append(about | by_step[step])
    return rows


def group_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The means at the end of the runs, with the bounds of their 95 % intervals."""
    rows = []
    for group in groups:
        for name in MEASURES:
            if found := group.estimate(name):
                rows.append({"group": group.name, "runs": len(group.runs), "number": name} | found._asdict())
    return rows


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(file) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
