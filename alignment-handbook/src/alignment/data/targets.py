"""What the report says of the targets that a loss makes of the scores."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_nca.loss_config import LossConfig
from trl_nca.losses import reward_targets

#: Rows whose targets are made at a time: some compare each response with each.
_BATCH = 10_000
#: Nats by which log-ratios are to spread at least, for their loss to tell responses apart.
_LEAST_SPREAD = 0.05
#: Share of rows with equal scores that is worth a warning.
_MANY = 0.05


def mean_largest_target(scores: np.ndarray, ks: np.ndarray, alpha: float) -> float:
    """Mean over the rows of the largest target: 1 for one-hot targets, 1 / K for uniform ones."""
    return torch.cat([reward_targets(rows, alpha).amax(dim=-1) for rows in _by_k(scores, ks)]).mean().item()


def warn_of_targets(scores: dict[str, Any], uniform: float) -> list[str]:
    """A warning where alpha makes one-hot or uniform labels."""
    alpha, largest, spread = scores["alpha"], scores["mean_largest_target"], scores["std_in_row"]
    advice = f"the scores of a row spread by {spread:.2g}: alpha of about that grades them"
    if alpha > 0 and largest > 0.99:
        return [f"alpha {alpha:g} makes one-hot labels of these scores (mean largest target {largest:.3f}); {advice}"]
    if largest < uniform + 0.05 * (1 - uniform):
        return [
            f"alpha {alpha:g} makes nearly uniform labels of these scores (mean largest target {largest:.3f}, uniform "
            f"is {uniform:.3f}); {advice}"
        ]
    return []


def warn_of_spread(scores: np.ndarray, ks: np.ndarray, config: LossConfig) -> list[str]:
    """A warning where the targets of a loss without alpha hardly tell the responses of a prompt apart.

    Args:
        scores: Of all responses of all rows. Shape (sum of K,).
        ks: K of each row. Shape (N,).
        config: The loss, and the beta that makes implicit rewards of log-ratios.
    """
    loss, beta, name = config.loss, config.beta, config.loss_type
    targets = [loss.targets(rows, None, config.alpha, beta) for rows in _by_k(scores, ks)]
    spreads = torch.cat([rows.std(dim=-1, correction=0) for rows in targets])  # (N,)
    spread, num_equal = spreads.mean().item(), int((spreads == 0).sum())
    if num_equal == len(ks):
        return [f"the scores of each row are equal: they do not tell {name} which response is better"]
    if spread < _LEAST_SPREAD * beta:
        return [
            f"{name} asks for log-ratios of a prompt's responses that spread by {spread / beta:.2g} nats: the scores "
            f"hardly tell which response is better; set scale_scores: zscore, or a beta smaller than {beta:g}"
        ]
    if num_equal > _MANY * len(ks):
        return [
            f"in {num_equal} of {len(ks)} rows all scores are equal: they do not tell {name} which response is better; "
            "row_rules: {identical_scores: drop} leaves them out"
        ]
    return []


def _by_k(scores: np.ndarray, ks: np.ndarray) -> Iterator[Tensor]:
    """The scores of rows of the same K, each of shape (n, K)."""
    of_k = np.repeat(ks, ks)
    for k in np.unique(ks):
        yield from torch.from_numpy(scores[of_k == k].reshape(-1, k)).split(_BATCH)
