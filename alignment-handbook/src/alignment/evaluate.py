"""Samples before and after training, scored by a function of the user's, and what their difference is worth."""

from typing import Any

import numpy as np

from alignment.formats import Messages
from alignment.recipe import RunConfig
from alignment.sample import sample_responses
from alignment.score import RewardFunction


def sample_and_score(
    model: Any,
    tokenizer: Any,
    prompts: list[Messages],
    reward_function: RewardFunction,
    config: RunConfig,
    seed: int,
    when: str,
) -> list[dict[str, Any]]:
    """Samples responses to the first prompts and scores each of them.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: Message lists; `config.max_eval_prompts` of them are used.
        reward_function: From `load_reward_function`.
        config: How many samples, how long, at what temperature.
        seed: Of the samples.
        when: "before" or "after" training, for the progress bar.

    Returns:
        For each prompt `prompt`, `samples` (texts) and their `scores`.
    """
    prompts = prompts[: config.max_eval_prompts]
    samples = sample_responses(
        model,
        tokenizer,
        prompts,
        num_samples=config.num_eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
        desc=f"Sampling {when} training",
    )
    flat_prompts = [prompt for prompt, texts in zip(prompts, samples, strict=True) for _ in texts]
    completions = [[{"role": "assistant", "content": text}] for texts in samples for text in texts]
    scores = iter(reward_function(prompts=flat_prompts, completions=completions))
    return [
        {"prompt": prompt, "samples": texts, "scores": [float(next(scores)) for _ in texts]}
        for prompt, texts in zip(prompts, samples, strict=True)
    ]


def mean_length(scored: list[dict[str, Any]]) -> float:
    """Mean length of the samples, in words."""
    return float(np.mean([len(text.split()) for row in scored for text in row["samples"]]))


def prompt_means(scored: list[dict[str, Any]]) -> np.ndarray:
    """Mean score of each prompt's samples. Shape (prompts,)."""
    return np.array([np.mean(row["scores"]) for row in scored])


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, num_resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over prompts. Paired, when the values are differences by prompt.

    Args:
        values: One value a prompt: prompts are what is drawn, so samples of one prompt do not count as independent.
            Shape (prompts,).

    Example:
        >>> low, high = bootstrap_interval(np.array([0.0, 1.0] * 50))
        >>> 0.39 < low < 0.45 < 0.55 < high < 0.61
        True
    """
    draws = np.random.default_rng(0).integers(len(values), size=(num_resamples, len(values)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)
