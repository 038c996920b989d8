"""Differences between arms by seed and held-out prompt, with the interval of draws of both.

S seeds, P held-out prompts: a number of each prompt after each run, in arrays of shape (S, P).
"""

from collections.abc import Sequence

import numpy as np

from alignment.report.groups import MEASURES, Estimate, Group, measure

#: The numbers of `MEASURES` that are of the same prompts, samples and responses in all arms, also where some are
#: trained on pairs.
COMPARED = ("held-out score", "gain at the start's length", "KL (nats)", "best (nats)")


def estimate(values: np.ndarray, num_resamples: int = 10_000) -> Estimate:
    """The mean, and its 95 % interval when both seeds and prompts are drawn anew.

    A drawn prompt is the same one for all seeds. Of a difference of two arms by seed and prompt, that is the paired
    interval. With one seed, the interval is over prompts alone.

    Args:
        values: Shape (S, P).
        num_resamples: Draws.

    Example:
        >>> estimate(np.array([[1.0, 2.0, 3.0]] * 2), num_resamples=2000).text("+.3f")
        '+2.000 [+1.000, +3.000]'
    """
    rng, (num_seeds, num_prompts) = np.random.default_rng(0), values.shape
    seeds = rng.integers(num_seeds, size=(num_resamples, num_seeds))
    prompts = rng.integers(num_prompts, size=(num_resamples, num_prompts))
    shares = np.array([np.bincount(drawn, minlength=num_seeds) for drawn in seeds]) / num_seeds
    of_prompts = shares @ values  # the mean over the drawn seeds, (num_resamples, P)
    low, high = np.percentile(np.take_along_axis(of_prompts, prompts, axis=1).mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def difference(arm: Group, baseline: Group, name: str) -> Estimate | None:
    """By how much a number is larger in an arm than in the baseline.

    Args:
        arm: Its runs, over the same seeds as the baseline's.
        baseline: What it is compared with.
        name: Of `COMPARED`.

    Returns:
        The estimate over the seeds and prompts that both have; None where they have none, or not the same prompts.
    """
    rows = [{run.recipe.get("seed"): measure(run, name) for run in group.runs} for group in (arm, baseline)]
    seeds = [seed for seed in rows[0] if seed in rows[1]]
    sizes = {len(of_seed[seed]) for of_seed in rows for seed in seeds}
    if len(sizes) != 1 or max(sizes) < 2:
        return None
    ours, theirs = (np.array([of_seed[seed] for seed in seeds]) for of_seed in rows)
    known = ~np.isnan(ours - theirs).any(axis=0)  # of a prompt that has no score somewhere nothing is compared
    return estimate((ours - theirs)[:, known]) if known.sum() > 1 else None


def difference_rows(groups: Sequence[Group], baseline: Group) -> list[list[str]]:
    """A head, and a row of differences for each arm but the baseline."""
    others = [group for group in groups if group is not baseline]
    found = {name: [difference(group, baseline, name) for group in others] for name in COMPARED}
    there = [name for name in COMPARED if any(found[name])]

    def cell(name: str, index: int) -> str:
        value = found[name][index]
        return "-" if value is None else value.text(f"+{MEASURES[name].removeprefix('+')}")

    rows = [[group.name, *(cell(name, index) for name in there)] for index, group in enumerate(others)]
    return [["", *there], *rows] if there else []


def about_differences(baseline: Group) -> str:
    """What the intervals of the differences cover, and what not."""
    count = len(baseline.runs)
    seeds = (
        f"The bootstrap draws the {count} seeds and the prompts. Few seeds make it too narrow for what the seed "
        "decides: if that were all, two would hold the true difference in 50 % of cases and three in 75 %."
        if count > 1
        else "There is one seed: the bootstrap draws prompts alone, and another seed may give another difference."
    )
    return (
        f"By seed and held-out prompt, which are the same for both arms, with 95 % intervals. {seeds} What a word of "
        "length does to the score is taken as known. Each interval is for itself: of twenty differences that are none, "
        "one interval leaves out zero."
    )
