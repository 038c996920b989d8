"""Writes the report on one run, or on groups of runs side by side: a single HTML file, from output folders alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.data import report as data_report
from alignment.evaluation.held_out import bootstrap_interval
from alignment.files import write_text
from alignment.report.alarm import alarm
from alignment.report.axes import name_at_ends, style
from alignment.report.figures import draw_all, remove_others, save_all
from alignment.report.groups import Group, as_text, differences, group_runs, warnings
from alignment.report.runs import Run, read_run
from alignment.report.samples import sampled_answers
from alignment.report.svg import as_svg
from alignment.report.tables import group_alarms, group_rows, run_rows, sampled_results, with_interval

REPORT = "report.html"
FIGURES = "figures"

# Escapes whatever it fills in: texts of data and recipes are never markup.
_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


class Table(NamedTuple):
    """A table of a page: its title, the head and the rows, and a note below it."""

    title: str
    rows: Sequence[Sequence[str]]
    note: str


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
    drawn = draw_all(group_runs([run]))
    save_all(drawn, Path(folder) / FIGURES)
    remove_others(drawn, Path(folder) / FIGURES)
    write_text(Path(folder) / REPORT, run_page(run, [(f.title, as_svg(f.axes.figure, f.title, f.name)) for f in drawn]))
    return run


def report_comparison(groups: Sequence[Group], file: Path, tables: Sequence[Table] = ()) -> None:
    """Writes one page on groups of runs, with tables of one's own below its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figures = [(f.title, as_svg(f.axes.figure, f.title, f.name)) for f in draw_all(groups)]
    write_text(file, comparison_page(groups, figures, tables))


def run_page(run: Run, figures: Sequence[tuple[str, str]]) -> str:
    """The page of a single run, with style and figures inside.

    Args:
        run: The run.
        figures: Title and `<svg>` of each.
    """
    found, (kind, verdict, basis) = alarm(run), headline(run)
    given, defaults = _settings(run)
    return _TEMPLATES.get_template("report.html.jinja").render(
        title=run.name,
        about=_about(run),
        kind=kind,
        verdict=verdict,
        basis=basis,
        numbers=big_numbers(run),
        alarm=found,
        rows=[row for row in run_rows(run) if row[2] != "-"],
        subset=run.recipe.get("eval_prompts_in_training"),
        figures=figures,
        samples=sampled_answers(group_runs([run])),
        data=data_report.summary("train", run.data_report) if run.data_report else None,
        plan=_plain(run.plan),
        given=given,
        defaults=defaults,
        environment=run.environment or {},
        seed=run.recipe.get("seed"),
    )


def comparison_page(groups: Sequence[Group], figures: Sequence[tuple[str, str]], tables: Sequence[Table] = ()) -> str:
    """The page of several groups, with style, figures and further tables inside. Arguments as for `run_page`."""
    names, (head, *rows) = [group.name for group in groups], group_rows(groups)
    return _TEMPLATES.get_template("comparison.html.jinja").render(
        title=f"Comparison: {'; '.join(names)}" if len(names) <= 4 else f"Comparison of {len(names)} groups",
        about=f"{sum(len(group.runs) for group in groups)} runs, {len(groups)} groups of equal settings",
        warnings=warnings(groups),
        head=head[1:],
        rows=list(zip([style(index) for index in range(len(rows))], rows, strict=True)),
        alarms=group_alarms(groups),
        tables=tables,
        has_seeds=any(len(group.runs) > 1 for group in groups),
        has_legend=not name_at_ends(names),
        names=names,
        figures=figures,
        samples=sampled_answers(groups),
        differences=differences(groups),
    )


def headline(run: Run) -> tuple[str, str, str]:
    """What came of a run: a word for its colour, a sentence with its interval, and what that is measured on."""
    compared = sampled_results(run)
    if compared:
        low, high = compared["score_difference_interval"]
        kind, words = _judge(low, high, 0.0, {"good": "Better", "bad": "Worse", "open": "Not shown to be better"})
        interval = f"{compared['score_difference']:+.3f} [{low:.3f}, {high:.3f}]"
        each = compared["samples_per_prompt"]
        controlled = with_interval(compared, "length_controlled_difference", "+.3f")
        basis = (
            f"Mean score of {each} samples a prompt, after less before, with its 95 % interval. Of samples as long as "
            f"at the start it is {controlled}, by regression."
        )
        return kind, f"{words}: {interval} on {compared['num_prompts']} held-out prompts", basis
    accuracies = run.of_prompts("rewards/accuracies")
    if len(accuracies) > 1:
        low, high = bootstrap_interval(accuracies)
        kind, words = _judge(low, high, 0.5, {"good": "above", "bad": "below", "open": "not shown to be above"})
        sentence = f"Accuracy {accuracies.mean():.3f} [{low:.3f}, {high:.3f}] on {len(accuracies)} held-out prompts"
        return kind, sentence, f"With its 95 % interval, {words} 0.5, where it starts. No samples are scored (yet)."
    return "open", "Nothing is measured on held-out prompts (yet)", "Held-out rows would be: eval_file, or a split."


def _judge(low: float, high: float, start: float, words: dict[str, str]) -> tuple[str, str]:
    kind = "good" if low > start else "bad" if high < start else "open"
    return kind, words[kind]


def big_numbers(run: Run) -> list[tuple[str, str, str]]:
    """Three numbers at the end: name, value, and where they started; fewer where fewer are known."""
    rows = {name: (start, end) for name, start, end in run_rows(run)}
    wanted = ("score of samples", "accuracy (share of the others)", "log p of the best (nats)", "loss (nats a prompt)",
              "margin (implicit reward)")  # fmt: skip
    there = [(name, rows[name][1], rows[name][0]) for name in wanted if rows[name][1] != "-"]
    return there[:3]


def _about(run: Run) -> str:
    model = Path(str(run.recipe.get("model_name_or_path", "?"))).name
    settings = f"{model}, {run.loss}, beta {run.beta:g}"
    if run.results:
        return f"{settings}. Finished, {run.results['seconds']:.0f} s."
    return f"{settings}. Unfinished: step {run.step} of {run.plan.get('num_steps') or '?'}."


def _settings(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """The recipe in two parts: what the recipe's file or a flag has set, and what is left at its default."""
    recipe = _plain(run.recipe)
    given = set((run.environment or {}).get("given", recipe))
    return {k: v for k, v in recipe.items() if k in given}, {k: v for k, v in recipe.items() if k not in given}


def _plain(settings: dict[str, Any]) -> dict[str, str]:
    return {key: as_text(value) for key, value in settings.items()}
