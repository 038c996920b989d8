"""What the report says of the targets that a loss makes of the scores."""

from typing import Any

import numpy as np
import torch

from trl_nca.losses import reward_targets


def mean_largest_target(scores: np.ndarray, ks: np.ndarray, alpha: float) -> float:
    """Mean over the rows of the largest target: 1 for one-hot targets, 1 / K for uniform ones."""
    of_k = np.repeat(ks, ks)
    rows = [torch.from_numpy(scores[of_k == k].reshape(-1, k)) for k in np.unique(ks)]
    return torch.cat([reward_targets(group, alpha).amax(dim=-1) for group in rows]).mean().item()


def warn_of_targets(scores: dict[str, Any], uniform: float) -> list[str]:
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
