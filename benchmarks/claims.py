"""What runs over several seeds say of Figure 2 of the paper, and how sure that is.

S seeds, P held-out prompts: a number of each prompt after each run, in arrays of shape (S, P).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

YES, NO, OPEN = "yes", "no", "not shown"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def is_positive(self) -> str:
        """Whether it is above zero: yes, no (it is below), or not shown (the interval contains zero)."""
        return YES if self.low > 0 else NO if self.high < 0 else OPEN


@dataclass(frozen=True)
class Claim:
    """A sentence that is put to the test, the answer, and the number that it rests on."""

    text: str
    answer: str
    estimate: Estimate


def estimate(values: np.ndarray, num_resamples: int = 10_000) -> Estimate:
    """The mean, and its interval when both seeds and prompts are drawn anew.

    A drawn prompt is the same one for all seeds. Of a difference of two losses by seed and prompt, that is the paired
    interval. With one seed, the interval is over prompts alone.

    Args:
        values: Shape (S, P).
        num_resamples: Draws.

    Example:
        >>> print(estimate(np.array([[1.0, 2.0, 3.0]] * 2), num_resamples=2000))
        +2.000 [+1.000, +3.000]
    """
    rng, (num_seeds, num_prompts) = np.random.default_rng(0), values.shape
    seeds = rng.integers(num_seeds, size=(num_resamples, num_seeds, 1))
    prompts = rng.integers(num_prompts, size=(num_resamples, 1, num_prompts))
    low, high = np.percentile(values[seeds, prompts].mean(axis=(1, 2)), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def claims(best: Mapping[str, np.ndarray], margins: Mapping[str, np.ndarray], other: str) -> list[Claim]:
    """Figure 2's claims on NCA and another loss.

    Args:
        best: By loss, the implicit reward of the best response. Each of shape (S, P), over the same seeds and prompts.
        margins: By loss, the best less the mean of the others. Shape (S, P).
        other: The loss that NCA is compared with: DPO, or InfoNCA, which is its case of K responses.
    """
    loses, keeps = estimate(-best[other]), estimate(best["NCA"])
    kept_more, wider = estimate(best["NCA"] - best[other]), estimate(margins[other] - margins["NCA"])
    return [
        Claim(f"Under {other}, the best responses lose likelihood", loses.is_positive, estimate(best[other])),
        # No fall is all that is claimed: an interval that is not below zero will do.
        Claim("Under NCA, the best responses do not lose likelihood", NO if keeps.is_positive == NO else YES, keeps),
        Claim(f"The best responses keep more of it under NCA than under {other}", kept_more.is_positive, kept_more),
        Claim(f"The margin is larger under {other} than under NCA", wider.is_positive, wider),
    ]


def verdict(found: list[Claim]) -> str:
    """One sentence on all claims."""
    failed = [claim for claim in found if claim.answer != YES]
    if not failed:
        return "Reproduced: each claim holds."
    return "NOT reproduced in full. " + " ".join(f"{claim.text}: {claim.answer}." for claim in failed)
