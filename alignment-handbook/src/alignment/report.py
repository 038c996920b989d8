"""The short table at the end of a run: what alignment changed, by how much, at what cost."""

import resource
import sys
from typing import Any

import numpy as np
import torch

from alignment.evaluate import bootstrap_interval, mean_length, prompt_means


def peak_memory_gb() -> float:
    """Most memory this process has held: of the GPU's allocator where there is one, else of the process. GB (1e9)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def compare_samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores and lengths of samples before and after training, and the interval of their difference.

    Args:
        before, after: From `alignment.evaluate.score_samples`, for the same prompts in the same order.
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


def final_table(results: dict[str, Any]) -> str:
    """The table that a run ends with.

    Args:
        results: `train`, `eval_before`, `eval_after`: metrics of the Trainer (the evals None without held-out rows);
            `samples`: from `compare_samples`, or None; `peak_memory_gb`; `output_dir`.
    """
    rows: list[tuple[str, str]] = []
    samples, before, after = results["samples"], results["eval_before"], results["eval_after"]
    if samples:
        intervals = {k: "[{:.3f}, {:.3f}]".format(*samples[k]) for k in samples if k.endswith("interval")}
        rows += [
            ("held-out score", f"{samples['score_before']:.3f} {intervals['score_before_interval']} -> "
                               f"{samples['score_after']:.3f} {intervals['score_after_interval']}"),
            ("difference (95 %)", f"{samples['score_difference']:+.3f} {intervals['score_difference_interval']}, "
                                  f"{samples['num_prompts']} prompts x {samples['samples_per_prompt']} samples"),
            ("verdict", verdict(samples)),
            ("mean length (words)", f"{samples['words_before']:.1f} -> {samples['words_after']:.1f}"),
        ]  # fmt: skip
    if before and after:
        rows += [
            ("log p(best response)", f"{before['eval_logps/chosen']:.2f} -> {after['eval_logps/chosen']:.2f}"),
            ("held-out loss", f"{before['eval_loss']:.4f} -> {after['eval_loss']:.4f}"),
            ("reward accuracy", f"{after['eval_rewards/accuracies']:.3f}"),
            ("reward margin", f"{after['eval_rewards/margins']:+.4f}"),
        ]
    rows += [
        ("seconds (training)", f"{results['train']['train_runtime']:.0f}"),
        ("seconds (all)", f"{results['seconds']:.0f}"),
        ("peak memory", f"{results['peak_memory_gb']:.2f} GB"),
        ("files", results["output_dir"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
