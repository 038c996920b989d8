"""Tables of a run, of rounds, and of groups of runs side by side: results, intervals, cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.evaluation.held_out import compare_samples, prompt_means, verdict
from alignment.report.alarm import alarm
from alignment.report.console import next_steps
from alignment.report.groups import MEASURES, Estimate, Group, held_out_rows, warnings
from alignment.report.runs import Run


def rounds_table(rounds: list[list[dict[str, Any]]]) -> str:
    """The held-out score round by round, and what each round gained on the one before.

    Args:
        rounds: Scored samples from `evaluation.held_out.sample_and_score`: of the model that the rounds started from,
            then of each round's model.

    Raises:
        UserError: They are not of the same prompts.
    """
    table = [("round", "held-out score (95 %)", "gain on the round before (95 %)", "verdict")]
    for number, (before, after) in enumerate(zip(rounds, rounds[1:], strict=False), start=1):
        if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
            raise UserError(f"round {number} was sampled on other prompts than the one before; give runs of one recipe")
        compared = compare_samples(before, after)
        start, now = (with_interval(compared, f"score_{part}", ".3f") for part in ("before", "after"))
        gain = with_interval(compared, "score_difference", "+.3f")
        if number == 1:
            table.append(("start", start, "", ""))
        table.append((str(number), now, gain, verdict(compared).partition(":")[0]))
    return aligned(table)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, in columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def run_rows(run: Run) -> list[tuple[str, str, str]]:
    """The numbers of a run as rows of name with unit, value at the start, and value at the end; "-" where none is.

    Losses and rewards are those of the newest evaluation; without held-out rows, of the last logged window of training,
    and the first row says so.
    """
    part = "" if run.last("eval_loss") is None else "eval_"
    best, start, rates = run.gained_by_best(run.last, part), run.start_of_best(part), run.speed()[1]
    training = (run.results or {}).get("train") or {}
    before, after = (float(np.nanmean(prompt_means(rows))) if rows else None for rows in (run.before, run.after))
    samples = sampled_results(run) or {}
    controlled = samples["score_before"] + samples["length_controlled_difference"] if samples else None

    def row(name: str, key: str, form: str) -> tuple[str, str, str]:
        return name, _number(run.start(part + key), form), _number(run.last(part + key), form)

    return [
        ("measured on", "", held_out_rows(run) if part else "training"),
        ("score of samples", _number(before, ".3f"), _number(after, ".3f")),
        ("score at the start's length", _number(before, ".3f"), _number(controlled, ".3f")),
        ("KL from the reference (nats)", "0", with_interval(samples, "kl", "z.2f")),
        row("accuracy (share of the others)", "rewards/accuracies", ".3f"),
        row("loss (nats a prompt)", "loss", ".4f"),
        ("log p of the best (nats)", _number(start, ".2f"), _number(run.last(f"{part}logps/chosen"), ".2f")),
        ("best, against the start (nats)", "0", _number(best, "+.2f")),
        row("best (implicit reward)", "rewards/chosen", "+.4f"),
        row("others (implicit reward)", "rewards/rejected", "+.4f"),
        row("margin (implicit reward)", "rewards/margins", "+.4f"),
        ("steps", "", f"{run.step} of {run.plan.get('num_steps') or '?'}"),
        ("speed (tokens/s)", "", f"{np.median(rates):.0f}" if len(rates) else "-"),
        ("training and its evaluations (s)", "", _number(training.get("train_runtime"), ".0f")),
    ]


def sampled_results(run: Run) -> dict[str, Any] | None:
    """What `compare_samples` says of a run; None where it was not sampled, or no prompt has a score on both sides."""
    if not run.before or not run.after or len(run.before) != len(run.after):
        return None
    try:
        return compare_samples(run.before, run.after)
    except UserError:
        return None


def with_interval(compared: dict[str, Any], name: str, form: str, unit: str = "") -> str:
    """A number of `compare_samples` with its interval, as `0.517 [0.463, 0.572]`; "-" where there is none."""
    if compared.get(name) is None:
        return "-"
    return Estimate(compared[name], *compared[f"{name}_interval"]).text(form) + unit


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def group_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Groups side by side: a head with the units, and a row each of their numbers with 95 % intervals.

    Of groups of several kinds of loss, its value is left out: they are different quantities.
    """
    names = [name for name in MEASURES if any(group.estimate(name) for group in groups)]
    if len({group.runs[0].loss for group in groups}) > 1:
        names = [name for name in names if not name.startswith("loss")]
    rows = [["", "runs", *names, "speed (tokens/s)", "held-out"]]
    for group in groups:
        estimates = [(group.estimate(name), MEASURES[name]) for name in names]
        rates = [float(np.median(rates)) for run in group.runs if len(rates := run.speed()[1])]
        held_out = dict.fromkeys(held_out_rows(run) for run in group.runs)
        numbers = ["-" if found is None else found.text(form) for found, form in estimates]
        speed = f"{np.mean(rates):.0f}" if rates else "-"
        rows.append([group.name, str(len(group.runs)), *numbers, speed, " / ".join(held_out)])
    return rows


def group_alarms(groups: Sequence[Group]) -> list[tuple[str, str, bool]]:
    """A line for each group with an alarm: its name, the worst of its runs' in words, and whether that is large."""
    lines = []
    for group in groups:
        found = [one for run in group.runs if (one := alarm(run))]
        if found:
            worst = max(found, key=lambda one: one.nats)
            of = f", in {len(found)} of {len(group.runs)} runs" if len(group.runs) > 1 else ""
            at_worst = " at worst" if len(found) > 1 else ""
            lines.append((group.name, f"best responses{at_worst} {worst.size}{of}", worst.is_large))
    return lines


def runs_table(groups: Sequence[Group]) -> str:
    """A single run's numbers, or groups side by side, with a line for each alarm and for what cannot be compared."""
    if len(groups) == len(groups[0].runs) == 1:
        (run,) = groups[0].runs
        found = alarm(run)
        lines = [aligned([(run.name, "start", "end"), *run_rows(run)]), *([f"ALARM: {found}"] if found else [])]
    else:
        alarms = (f"ALARM, {name}: {found}" for name, found, _ in group_alarms(groups))
        lines = [aligned(group_rows(groups)), *warnings(groups), *alarms]
    return "\n".join(lines)


def final_table(results: dict[str, Any]) -> str:
    """The table that a run ends with.

    Args:
        results: `train` and `eval`: metrics of the Trainer (`eval` None without held-out rows); `samples`: from
            `compare_samples`, or None; `seconds`; `peak_memory_gb`; `output_dir`.
    """
    rows: list[tuple[str, str]] = []
    samples, held_out = results["samples"], results["eval"]
    if samples:
        parts = ("before", "after", "difference")
        before, after, difference = (with_interval(samples, f"score_{part}", ".3f") for part in parts)
        rows += [
            ("held-out score (95 %)", f"{before} -> {after}"),
            ("difference (95 %)", f"{difference}, {samples['num_prompts']} prompts x {samples['samples_per_prompt']}"),
            ("at the start's length", with_interval(samples, "length_controlled_difference", ".3f")),
            ("verdict", verdict(samples)),
            ("mean length (words)", f"{samples['words_before']:.1f} -> {samples['words_after']:.1f}"),
            ("KL from the reference", with_interval(samples, "kl", "z.2f", " nats a response")),
        ]
    if held_out:
        best, gained = held_out["eval_logps/chosen"], held_out.get("eval_logratios/chosen")
        start = (
            "" if gained is None else f"{best - gained:.2f} -> "
        )  # the policy starts as the reference, if it has one
        rows += [
            ("log p(best response)", f"{start}{best:.2f}"),
            ("held-out loss", f"{held_out['eval_loss']:.4f}"),
            ("reward accuracy", f"{held_out['eval_rewards/accuracies']:.3f}"),
            ("reward margin", f"{held_out['eval_rewards/margins']:+.4f}"),
        ]
    rows += [
        ("seconds", f"{results['seconds']:.0f}, {results['train']['train_runtime']:.0f} of them training"),
        ("peak memory", f"{results['peak_memory_gb']:.2f} GB"),
        ("files", results["output_dir"]),
        *next_steps(results["output_dir"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
