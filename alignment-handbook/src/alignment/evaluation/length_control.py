"""The difference in score that is left when samples before and after training are compared at one length.

Legend: P prompts, R resamples of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Rows = Sequence[dict[str, Any]]


def control_length(before: Rows, after: Rows) -> np.ndarray:
    r"""The change of each prompt's mean score, without what its change of length explains.

    .. math:: s = a_p + b \, \ell + c \, [\text{after}] + e

    is fitted by least squares to the scores and lengths of the samples before and after training. The intercept of each
    prompt p takes what makes its scores high or its answers long; each prompt counts equally, before and after. So c is
    the mean difference less b times the mean change of length: the difference between samples as long as those at the
    start.

    It assumes that a word more changes the score by the same b for all prompts and lengths, before training and after,
    and that it is the length that does it: where longer samples are worse for another reason, and training removes
    that reason, a part of what was learned is taken for brevity. Lengths are words between spaces; where they do not
    vary, b is 0 and c is the plain difference.

    Args:
        before, after: Rows with `samples` and `scores`, of the same prompts, each with a score on both sides.

    Returns:
        The difference of each prompt, less b times that of its mean length. Their mean is c. Shape (P,).
    """
    moments = _all_moments(before, after)
    return moments[:, 1] - _slopes(moments.mean(axis=0)) * moments[:, 0]


def control_length_interval(before: Rows, after: Rows, num_resamples: int = 10_000) -> tuple[float, float]:
    """95 % interval of the length-controlled difference c: a bootstrap over prompts, with a regression on each draw.

    Args:
        before, after: As for `control_length`.
        num_resamples: Number of draws, R.
    """
    moments = _all_moments(before, after)
    num_prompts = len(moments)
    draws = np.random.default_rng(0).integers(num_prompts, size=(num_resamples, num_prompts))
    means = np.stack([column[draws].mean(axis=1) for column in moments.T], axis=1)  # (R, 4)
    low, high = np.percentile(means[:, 1] - _slopes(means) * means[:, 0], [2.5, 97.5])
    return float(low), float(high)


def _all_moments(before: Rows, after: Rows) -> np.ndarray:
    return np.array([_moments(*rows) for rows in zip(before, after, strict=True)])  # (P, 4)


def _moments(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, ...]:
    """A prompt's part in the regression: changes of mean length and score, and squares and products within it.

    The prompt's intercept is that of its two means. What is left are deviations of samples from the mean of their side,
    and half the change on each side of it; the mean change over prompts, which c takes, is subtracted in `_slopes`.
    """
    cells = [_lengths_and_scores(row) for row in (before, after)]
    length, score = cells[1].mean(axis=1) - cells[0].mean(axis=1)
    squares = sum(np.cov(cell, bias=True) for cell in cells)  # (2, 2)
    return length, score, squares[0, 0] + length**2 / 2, squares[0, 1] + length * score / 2


def _lengths_and_scores(row: dict[str, Any]) -> np.ndarray:
    """Words and scores of the samples that have a score. Shape (2, samples)."""
    pairs = zip(row["samples"], row["scores"], strict=True)
    return np.array([(len(text.split()), score) for text, score in pairs if score is not None], dtype=float).T


def _slopes(means: np.ndarray) -> np.ndarray:
    """The slope b from means of moments over prompts, shape (..., 4); 0 where lengths do not vary. Shape (...,)."""
    length, score, squares, products = np.moveaxis(means, -1, 0)
    variance = squares - length**2 / 2
    varies = variance > 1e-9 * np.maximum(squares, 1)
    return np.where(varies, products - length * score / 2, 0) / np.where(varies, variance, 1)
