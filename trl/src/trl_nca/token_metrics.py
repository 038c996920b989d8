"""What is logged of the response tokens' distributions: their entropy, and how often the next token is the likeliest.

Legend: B prompts, K responses, R response tokens of a forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class TokenMetrics:
    """Collects the statistics of the tokens of a micro-batch's forwards under the policy.

    Args:
        batch: The micro-batch. Of forwards with gradient and without, those count that are like the place where this is
            made: one without gradient, before that with it, does not.
    """

    NAMES = "entropy", "mean_token_accuracy"

    def __init__(self, batch: dict[str, Any]):
        self._scores, self._mask = batch["scores"], batch["response_mask"]
        self._training = torch.is_grad_enabled()
        self._sums = torch.zeros(*self._mask.shape, 3, device=self._mask.device)  # of entropy, accuracy, tokens

    @property
    def enabled(self) -> bool:
        """Whether a forward counts that is run now."""
        return torch.is_grad_enabled() == self._training

    def add(self, chunk: dict[str, Any], statistics: Tensor) -> None:
        """Adds those of a forward.

        Args:
            chunk: The batch, or a part of it.
            statistics: From `trl_nca.cross_entropy.cross_entropy`. Shape (R, 2).
        """
        index = chunk["layout"].to(statistics.device).response_index  # (R,)
        of_tokens = pad(statistics.float(), (0, 1), value=1.0)  # (R, 3)
        sums = torch.zeros_like(self._sums).flatten(0, 1).index_add(0, index, of_tokens).view_as(self._sums)
        self._sums += sums * chunk["response_mask"][..., None]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Means over a prompt's tokens, under TRL's names. Shape (B,) each.

        `entropy` in nats, of the tokens of all responses; `mean_token_accuracy`, of those of the response with the
        highest score (the first of them on a tie) the share that the policy gives no other token a higher probability.
        """
        best = self._scores.masked_fill(~self._mask, -torch.inf).argmax(dim=1)
        of_best = self._sums.take_along_dim(best[:, None, None], dim=1).squeeze(1)  # (B, 3)
        of_all = self._sums.sum(dim=1)
        return dict(zip(self.NAMES, (of_all[:, 0] / of_all[:, 2], of_best[:, 1] / of_best[:, 2]), strict=True))
