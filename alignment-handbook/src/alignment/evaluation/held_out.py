"""Scores samples before and after training by a reward function, and compares them."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from alignment.errors import UserError
from alignment.evaluation.length_control import control_length, control_length_interval
from alignment.input_limits import check_input, input_limits
from alignment.recipe import RunConfig
from alignment.sampling.kept import sample_or_read
from alignment.sampling.reward_function import RewardFunction, call_reward_function, call_score_parts
from alignment.sampling.sample import encode_row

#: Numbers of responses, a list a prompt, from the token ids of prompts and of the responses to each.
OfResponses = Callable[[list[list[int]], list[list[list[int]]]], list[list[float]]]


def sample_and_score(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    reward_function: RewardFunction,
    config: RunConfig,
    seed: int,
    when: str,
    logratios: OfResponses | None = None,
) -> list[dict[str, Any]]:
    """Samples responses to the first prompts and scores each of them.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        rows: Held-out rows as texts, with their `tools`; `config.max_eval_prompts` of them are used. Their other
            columns, if they were kept, are handed to the reward function by name.
        reward_function: From `load_reward_function`.
        config: How many samples, how long, at what temperature.
        seed: Seeds the samples.
        when: "before" or "after" training. Those of before may be kept ones, see `config.samples_before_dir`.
        logratios: Log-ratios of the policy and its reference, see `trl_nca.divergence`; None: they are not measured.

    Returns:
        For each prompt `prompt`, `samples` (texts) and their `scores`, None where the function does not apply;
        `score_parts` where the function has some, see `call_score_parts`; and `logratios` where they are measured.

    Raises:
        UserError: See `call_reward_function`; or the function applies to no sample at all.
    """
    rows = rows.select(range(min(config.max_eval_prompts, len(rows))))
    prompts, others = rows["prompt"][:], rows["columns"][:]
    drawn = sample_or_read(
        config.samples_before_dir if when == "before" else None,
        model,
        tokenizer,
        [*rows],
        num_samples=config.num_eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
        desc=f"Sampling {when} training",
    )
    samples = [[response.text for response in of_prompt] for of_prompt in drawn]
    scored = [
        json.loads(other or "{}") | {"prompt": prompt, "responses": texts}
        for prompt, texts, other in zip(prompts, samples, others, strict=True)
    ]
    name = config.reward_function or "the reward function"
    scores = call_reward_function(reward_function, name, scored, rows["location"][:])
    if all(score is None for of_prompt in scores for score in of_prompt):
        raise UserError(f"reward_function: {name} returned None for all samples; it must apply to some of them")
    parts = call_score_parts(reward_function, name, scored, rows["location"][:])
    columns = {"prompt": prompts, "samples": samples, "scores": scores, "score_parts": parts}
    if logratios:
        prompt_ids = [encode_row(tokenizer, row) for row in rows]
        columns["logratios"] = logratios(prompt_ids, [[response.ids for response in of_prompt] for of_prompt in drawn])
    given = {name: values for name, values in columns.items() if values}
    return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]


def check_prompts(model: Any, tokenizer: Any, rows: Dataset, config: RunConfig) -> None:
    """Ends a run whose held-out prompts, with the samples after them, are more than the model can read.

    Args:
        model, tokenizer, rows, config: As for `sample_and_score`.

    Raises:
        UserError: Names the row.
    """
    limits = input_limits(model)
    for row in rows.select(range(min(config.max_eval_prompts, len(rows)))):
        ids = encode_row(tokenizer, row)
        check_input(limits, ids, config.max_new_tokens, row["location"], "give less --max_new_tokens")


def mean_length(scored: list[dict[str, Any]]) -> float:
    """Mean length of the samples, in words."""
    return float(np.mean([len(text.split()) for row in scored for text in row["samples"]]))


def prompt_means(scored: list[dict[str, Any]]) -> np.ndarray:
    """Mean score of each prompt's samples that have one; NaN where none has. Shape (prompts,)."""
    given = [[score for score in row["scores"] if score is not None] for row in scored]
    return np.array([np.mean(scores) if scores else np.nan for scores in given])


def prompt_kls(scored: list[dict[str, Any]]) -> np.ndarray:
    """KL divergence of the policy from its reference at each prompt, in nats a response: the mean log-ratio of samples.

    Shape (prompts,); (0,) where it was not measured. See `trl_nca.divergence`.
    """
    return np.array([np.mean(row["logratios"]) for row in scored if "logratios" in row])


def with_scores(
    before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the prompts that have a score both before and after; none, where the prompts are not the same."""
    pairs = zip(before, after, strict=True) if len(before) == len(after) else ()
    kept = [rows for rows in pairs if all(any(s is not None for s in row["scores"]) for row in rows)]
    return [row for row, _ in kept], [row for _, row in kept]


def compare_samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores and lengths of samples before and after training, and how far the policy has moved for them.

    Args:
        before, after: From `sample_and_score`, for the same prompts in the same order. Prompts without a score on
            either side are left out.

    Returns:
        The mean scores, their difference and `length_controlled_difference` (see `control_length`), each with its
        interval; mean lengths; and `kl`, None where it was not measured, with `kl_interval`.

    Raises:
        UserError: No prompt has a score on both sides.
    """
    both = with_scores(before, after)
    if not both[0]:
        raise UserError("reward_function: no prompt has a sample with a score both before and after training")
    scores_before, scores_after = map(prompt_means, both)
    kls = prompt_kls(after)
    return {
        "num_prompts": len(scores_before),
        "samples_per_prompt": len(before[0]["samples"]),
        "score_before": float(scores_before.mean()),
        "score_before_interval": bootstrap_interval(scores_before),
        "score_after": float(scores_after.mean()),
        "score_after_interval": bootstrap_interval(scores_after),
        "score_difference": float(np.mean(scores_after - scores_before)),
        "score_difference_interval": list(bootstrap_interval(scores_after - scores_before)),
        "length_controlled_difference": float(control_length(*both).mean()),
        "length_controlled_difference_interval": list(control_length_interval(*both)),
        "words_before": mean_length(before),
        "words_after": mean_length(after),
        "kl": float(kls.mean()) if len(kls) else None,
        "kl_interval": list(bootstrap_interval(kls)) if len(kls) else None,
    }


def verdict(comparison: dict[str, Any]) -> str:
    """Whether the held-out score rose, in words that do not claim more than the interval does."""
    low, high = comparison["score_difference_interval"]
    if low > 0:
        return "improved: the interval of the difference is above zero"
    if high < 0:
        return "WORSE: the interval of the difference is below zero"
    return "NOT SHOWN to improve: the interval of the difference contains zero"


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, num_resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over prompts. Paired, when the values are differences by prompt.

    Args:
        values: One value a prompt: prompts are drawn, so samples of one prompt do not count as independent.
            Shape (prompts,).
        confidence: Share of the distribution inside the interval.
        num_resamples: Number of draws.

    Example:
        >>> low, high = bootstrap_interval(np.array([0.0, 1.0] * 50))
        >>> 0.39 < low < 0.45 < 0.55 < high < 0.61
        True
    """
    draws = np.random.default_rng(0).integers(len(values), size=(num_resamples, len(values)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)
