"""Tables: what alignment changed, by how much, at what cost; of a run, of rounds, of runs side by side."""

import resource
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from alignment.errors import UserError
from alignment.evaluate import bootstrap_interval, mean_length, prompt_means
from alignment.runs import Run, alarm


def peak_memory_gb() -> float:
    """Most memory this process has held: of the GPU's allocator where there is one, else of the process. GB (1e9)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def compare_samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores and lengths of samples before and after training, and the interval of their difference.

    Args:
        before, after: From `alignment.evaluate.sample_and_score`, for the same prompts in the same order.
    """
    scores_before, scores_after = prompt_means(before), prompt_means(after)
    low, high = bootstrap_interval(scores_after - scores_before)
    return {
        "num_prompts": len(before),
        "samples_per_prompt": len(before[0]["samples"]),
        "score_before": float(scores_before.mean()),
        "score_before_interval": bootstrap_interval(scores_before),
        "score_after": float(scores_after.mean()),
        "score_after_interval": bootstrap_interval(scores_after),
        "score_difference": float(np.mean(scores_after - scores_before)),
        "score_difference_interval": [low, high],
        "words_before": mean_length(before),
        "words_after": mean_length(after),
    }


def verdict(comparison: dict[str, Any]) -> str:
    """Whether the held-out score rose, in words that do not claim more than the interval does."""
    low, high = comparison["score_difference_interval"]
    if low > 0:
        return "improved: the interval of the difference is above zero"
    if high < 0:
        return "WORSE: the interval of the difference is below zero"
    return "NOT SHOWN to improve: the interval of the difference contains zero"


def rounds_table(rounds: list[list[dict[str, Any]]]) -> str:
    """The held-out score round by round, and what each round gained on the one before.

    Args:
        rounds: Scored samples from `alignment.evaluate.sample_and_score`: of the model that the rounds started from,
            then of each round's.

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
    """What is to be known of a run at a glance; "-" is what it has not told (yet).

    Losses and rewards are those of the newest evaluation; without held-out rows, of the last logged window of training,
    and the row `measured on` says so.
    """
    part = "" if run.last("eval_loss") is None else "eval_"
    best, rates = run.last(f"{part}rewards/chosen"), run.speed()[1]
    training = (run.results or {}).get("train") or {}

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
        "score of samples": " -> ".join(f"{prompt_means(s).mean():.3f}" for s in (run.before, run.after) if s) or "-",
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
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
