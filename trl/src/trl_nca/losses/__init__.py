r"""The losses over K scored responses to one prompt: the table of them, and the notation.

- B prompts, K responses to each (padded to the largest K of the batch; `response_mask` tells which are real),
- scores \(s_i\): the numbers in the data,
- implicit rewards \(r_i = \beta\,[\log \pi(y_i|x) - \log \pi_{ref}(y_i|x)]\), log-probs summed over the response's
  tokens,
- targets \(w_i\) or \(t_i\): what the scores alone say of each response (`targets`).

Losses (`contrastive`: NCA and InfoNCA; `pairs`; `ranking`; `regression`) and targets are pure functions: they take any
leading shape in place of B, work in the dtype that they are given (float32 or wider), and a loss is one number a
prompt. The trainer averages them over the global batch. `own` loads a user's.

Reference: Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv 2402.05369.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trl_nca.losses.contrastive import info_nca_loss, nca_loss
from trl_nca.losses.pairs import biased_nca_loss, dpo_loss, ipo_loss, robust_dpo_loss
from trl_nca.losses.ranking import plackett_luce_loss
from trl_nca.losses.regression import gvpo_loss, regression_loss
from trl_nca.losses.targets import (
    advantage_targets,
    centered_targets,
    gap_targets,
    hard_labels,
    quantile_targets,
    rank_targets,
    reward_targets,
    soft_labels,
)

__all__ = [
    "LOSSES",
    "Loss",
    "advantage_targets",
    "biased_nca_loss",
    "centered_targets",
    "dpo_loss",
    "gvpo_loss",
    "info_nca_loss",
    "ipo_loss",
    "nca_loss",
    "plackett_luce_loss",
    "quantile_targets",
    "regression_loss",
    "reward_targets",
    "robust_dpo_loss",
]


@dataclass(frozen=True)
class Loss:
    """A loss, and what the engine must know of it.

    Attributes:
        targets: (scores, response_mask, alpha, beta) -> targets, from scores of shape (B, K) to shape (B, K).
        loss: (rewards, targets, response_mask) -> loss of each prompt, from shapes (B, K) to shape (B,).
        separable: Whether it is, for each prompt, a sum over its responses: a response's gradient then needs no
            other's log-prob.
        num_responses: How many responses a prompt must have; None: any number from 2.
        start: Its value at step 0 (policy == reference) by the number of responses; None where scores or beta decide.
        uses_alpha: Whether the targets depend on alpha.
        has_labels: Whether the targets say how likely each response of a pair is the better one: those can be smoothed,
            and asked for a margin.
        per_token: Whether implicit rewards are always divided by the response's tokens.
        reference_free: Whether implicit rewards are always of the policy alone.
        margin: By how much the better response's reward is to exceed the other's, where the recipe does not say.
    """

    targets: Callable[[Tensor, Tensor | None, float, float], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    separable: bool = False
    num_responses: int | None = None
    start: Callable[[int], float] | None = None
    uses_alpha: bool = False
    has_labels: bool = False
    per_token: bool = False
    reference_free: bool = False
    margin: float = 0.0


def _log_2(k: int) -> float:
    return math.log(2)


def _2_log_2(k: int) -> float:
    return 2 * math.log(2)


def _log_factorial(k: int) -> float:
    return math.lgamma(k + 1)


#: The losses by the name that a recipe gives them (`loss_type`), spelt as in their papers.
LOSSES = {
    "NCA": Loss(soft_labels, nca_loss, separable=True, start=_2_log_2, uses_alpha=True),
    "InfoNCA": Loss(soft_labels, info_nca_loss, start=math.log, uses_alpha=True),
    "PL": Loss(rank_targets, plackett_luce_loss, start=_log_factorial),
    "QRPO": Loss(quantile_targets, regression_loss, separable=True),
    "OAPL": Loss(advantage_targets, regression_loss, separable=True),
    "GVPO": Loss(centered_targets, gvpo_loss),
    "DPO": Loss(soft_labels, dpo_loss, num_responses=2, start=_log_2, uses_alpha=True, has_labels=True),
    "robustDPO": Loss(hard_labels, robust_dpo_loss, num_responses=2, start=_log_2, has_labels=True),
    "SimPO": Loss(
        hard_labels, dpo_loss, num_responses=2, has_labels=True, per_token=True, reference_free=True, margin=0.5
    ),
    "IPO": Loss(gap_targets, ipo_loss, num_responses=2, per_token=True),
    "biasedNCA": Loss(
        soft_labels, biased_nca_loss, separable=True, num_responses=2, start=_2_log_2, uses_alpha=True, has_labels=True
    ),
}
