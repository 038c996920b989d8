"""Tables of a run, of rounds, and of runs side by side: results, intervals, cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.evaluation.held_out import compare_samples, prompt_means, verdict
from alignment.report.console import next_steps
from alignment.report.runs import Run, alarm


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
        start, now = (
            "{:.3f} [{:.3f}, {:.3f}]".format(compared[f"score_{part}"], *compared[f"score_{part}_interval"])
            for part in ("before", "after")
        )
        gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(compared["score_difference"], *compared["score_difference_interval"])
        if number == 1:
            table.append(("start", start, "", ""))
        table.append((str(number), now, gain, verdict(compared).partition(":")[0]))
    return _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def key_figures(run: Run) -> dict[str, str]:
    """The most important numbers of a run; "-" where there is none (yet).

    Losses and rewards are those of the newest evaluation; without held-out rows, of the last logged window of training,
    and the row `measured on` says so.
    """
    part = "" if run.last("eval_loss") is None else "eval_"
    best, rates = run.last(f"{part}rewards/chosen"), run.speed()[1]
    training = (run.results or {}).get("train") or {}

    samples = [np.nanmean(prompt_means(scored)) for scored in (run.before, run.after) if scored]

    def number(key: str, form: str) -> str:
        value = run.last(part + key)
        return "-" if value is None else format(value, form)

    return {
        "loss": str(run.recipe.get("loss_type", "-")),
        "beta": f"{run.beta:g}",
        "alpha": f"{run.recipe['alpha']:g}" if "alpha" in run.recipe else "-",
        "steps": f"{run.step} of {run.plan.get('num_steps') or '?'}",
        "measured on": "held-out" if part else "training",
        "loss value": number("loss", ".4f"),
        "best (nats)": "-" if best is None else f"{best / run.beta:+.2f}",
        "best": number("rewards/chosen", "+.4f"),
        "others": number("rewards/rejected", "+.4f"),
        "margin": number("rewards/margins", "+.4f"),
        "accuracy": number("rewards/accuracies", ".3f"),
        "score of samples": " -> ".join(f"{mean:.3f}" for mean in samples) or "-",
        "tokens/s": f"{np.median(rates):.0f}" if len(rates) else "-",
        "training (s)": f"{training['train_runtime']:.0f}" if "train_runtime" in training else "-",
    }


def runs_table(runs: Sequence[Run]) -> str:
    """Runs side by side, a column each, and a line for each alarm."""
    figures = [key_figures(run) for run in runs]
    table = [["run", *(run.name for run in runs)], *([name, *(f[name] for f in figures)] for name in figures[0])]
    lines = [_aligned(table), *(f"ALARM, {run.name}: {found}" for run in runs if (found := alarm(run)))]
    return "\n".join(lines)


def final_table(results: dict[str, Any]) -> str:
    """The table that a run ends with.

    Args:
        results: `train` and `eval`: metrics of the Trainer (`eval` None without held-out rows); `samples`: from
            `compare_samples`, or None; `beta`; `seconds`; `peak_memory_gb`; `output_dir`.
    """
    rows: list[tuple[str, str]] = []
    samples, held_out = results["samples"], results["eval"]
    if samples:
        before, after, difference = (
            "{:.3f} [{:.3f}, {:.3f}]".format(samples[f"score_{part}"], *samples[f"score_{part}_interval"])
            for part in ("before", "after", "difference")
        )
        rows += [
            ("held-out score (95 %)", f"{before} -> {after}"),
            ("difference (95 %)", f"{difference}, {samples['num_prompts']} prompts x {samples['samples_per_prompt']}"),
            ("verdict", verdict(samples)),
            ("mean length (words)", f"{samples['words_before']:.1f} -> {samples['words_after']:.1f}"),
        ]
    if held_out:
        # The policy starts as the reference, and the reward is beta times what it has gained on it since.
        start = held_out["eval_logps/chosen"] - held_out["eval_rewards/chosen"] / results["beta"]
        rows += [
            ("log p(best response)", f"{start:.2f} -> {held_out['eval_logps/chosen']:.2f}"),
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
