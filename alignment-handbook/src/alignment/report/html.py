"""Writes the report on one run, or on several side by side: a single HTML file, from output folders alone."""

import base64
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.data import report as data_report
from alignment.files import write_text
from alignment.report.figures import draw_all
from alignment.report.runs import Run, alarm, label, read_run
from alignment.report.tables import key_figures

REPORT = "report.html"
FIGURES = "figures"
#: Prompts whose sampled answers are shown.
_NUM_SAMPLES = 3

# Escapes whatever it fills in: texts of data and recipes are never markup.
_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


def report_run(folder: str | Path, history: list[dict[str, float]] | None = None) -> Run:
    """Writes report.html and figures/*.png into a run's folder, over those of before.

    Args:
        folder: Output folder of the run, finished or not.
        history: See `alignment.report.runs.read_run`.

    Returns:
        The run that was read.

    Raises:
        UserError: See `alignment.report.runs.read_run`.
    """
    run = read_run(folder, history)
    figures = draw_all([run], Path(folder) / FIGURES)
    write_text(Path(folder) / REPORT, page([run], figures))
    return run


def report_comparison(runs: Sequence[Run], file: Path) -> None:
    """Writes one page on several runs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_text(file, page(runs, draw_all(runs, Path(folder))))


def page(runs: Sequence[Run], figures: Sequence[tuple[str, Path]]) -> str:
    """The HTML, with style and images inside.

    Args:
        runs: One, or those to compare.
        figures: Title and PNG of each.
    """
    names = [label(run, runs) for run in runs]
    single = runs[0] if len(runs) == 1 else None
    return _TEMPLATES.get_template("report.html.jinja").render(
        title=single.name if single else f"Comparison: {', '.join(names)}",
        about=_about(single) if single else f"{len(runs)} runs",
        alarms=[(run.name, found) for run in runs if (found := alarm(run))],
        names=names,
        table=_transposed([{"run": run.name, **key_figures(run)} for run in runs]),
        figures=[(title, base64.b64encode(file.read_bytes()).decode()) for title, file in figures],
        answers=_answers(runs, names),
        data=data_report.summary("train", single.data_report) if single and single.data_report else None,
        plan=_plain(single.plan) if single else {},
        recipe=_plain(single.recipe) if single else {},
        differences=_differences(runs),
    )


def _about(run: Run) -> str:
    model = Path(str(run.recipe.get("model_name_or_path", "?"))).name
    if run.results:
        return f"{model}. Finished, {run.results['seconds']:.0f} s."
    return f"{model}. Unfinished: step {run.step} of {run.plan.get('num_steps') or '?'}."


def _transposed(columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _answers(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """The first sample on the first prompts, before training and after, not chosen by anything."""
    columns = [("before", runs[0].before)]
    columns += [(name if len(runs) > 1 else "after", run.after) for run, name in zip(runs, names, strict=True)]
    found = []
    for i, row in enumerate((runs[0].before or runs[0].after or [])[:_NUM_SAMPLES]):
        there = [(name, rows[i]) for name, rows in columns if rows and i < len(rows)]
        answers = [
            (name, sampled["samples"][0], "no score" if sampled["scores"][0] is None else f"{sampled['scores'][0]:.3g}")
            for name, sampled in there
            if sampled["prompt"] == row["prompt"]
        ]
        found.append({"prompt": _as_text(row["prompt"]), "answers": answers})
    return found


def _as_text(prompt: Any) -> str:
    """Messages one below the other; of a single one, its text."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _plain(settings: dict[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the recipes that are not the same in all runs."""
    recipes = [_plain(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [recipe.get(key, "-") for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
