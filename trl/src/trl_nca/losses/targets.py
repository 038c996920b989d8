r"""What the losses learn from: a target for each response, made from the scores of its prompt alone.

Those that the table of losses has take `(scores, response_mask, alpha, beta)` and return a tensor of shape (B, K), 0
for padded responses. For the notation see `trl_nca.losses`.
"""

import math

import torch
from torch import Tensor


def reward_targets(scores: Tensor, alpha: float, response_mask: Tensor | None = None) -> Tensor:
    r"""Soft labels of the responses of each prompt: how much of the target policy's weight each one gets.

    .. math:: w_i = \mathrm{softmax}(s / \alpha)_i

    Args:
        scores: Scores of the data, any unit, higher is better. Shape (B, K).
        alpha: Temperature, in the unit of the scores, >= 0. Small is one-hot, large is uniform. 0 is the limit:
            one-hot on the best response; the best ones share the weight when they tie.
        response_mask: True for real responses. Shape (B, K). Default: all real.

    Returns:
        Targets; each row sums to 1. Shape (B, K).

    Raises:
        ValueError: alpha is negative.

    Example:
        >>> reward_targets(torch.tensor([[2.0, 1.0, 2.0]]), alpha=0)
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    if alpha < 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    if response_mask is not None:
        scores = scores.masked_fill(~response_mask, -torch.inf)
    gaps = scores - scores.amax(dim=-1, keepdim=True)  # (B, K), 0 at the best: no overflow however small alpha is
    if alpha == 0:
        best = (gaps == 0).to(scores.dtype)
        return best / best.sum(dim=-1, keepdim=True)
    return torch.softmax(gaps / alpha, dim=-1)


def soft_labels(scores: Tensor, response_mask: Tensor | None, alpha: float, beta: float) -> Tensor:
    """`reward_targets` as the table of losses calls it. Shape (B, K)."""
    return reward_targets(scores, alpha, response_mask)


def hard_labels(scores: Tensor, response_mask: Tensor | None, alpha: float, beta: float) -> Tensor:
    """One-hot on the best response, whatever alpha is; ties share. Shape (B, K)."""
    return reward_targets(scores, 0.0, response_mask)


def quantile_targets(scores: Tensor, response_mask: Tensor | None, alpha: float, beta: float) -> Tensor:
    r"""Rewards of the policy that is optimal for the quantile of the score (QRPO).

    .. math:: t_i = q_i - \beta \log Z, \qquad q_i = \tfrac1K\,\big|\{j : s_j \le s_i\}\big|, \qquad
              Z = \int_0^1 e^{q/\beta}\,dq = \beta\,(e^{1/\beta} - 1)

    Args:
        scores: Scores of the data; only their order counts. Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.
        alpha: Not used.
        beta: That of the implicit rewards, > 0.

    Returns:
        Targets of the implicit rewards. Shape (B, K).

    References:
        Matrenok et al., Quantile Reward Policy Optimization, arXiv 2507.08068.

    Example:
        >>> quantile_targets(torch.tensor([[2.0, 1.0, 2.0]]), None, 0.0, 1e-3)  # log Z is 1 / beta + log(beta)
        tensor([[ 0.0069, -0.6598,  0.0069]])
    """
    real = _real(scores, response_mask)
    not_higher = (scores[..., None, :] <= scores[..., :, None]) & real[..., None, :]  # (B, K, K)
    quantiles = not_higher.sum(dim=-1) / real.sum(dim=-1, keepdim=True).to(scores.dtype)
    # e^{1/beta} overflows where beta is small: log Z = 1 / beta + log(beta) + log(1 - e^{-1/beta}).
    beta_log_z = 1 + beta * (math.log(beta) + math.log(-math.expm1(-1 / beta)))
    return (quantiles - beta_log_z).masked_fill(~real, 0.0)


def advantage_targets(scores: Tensor, response_mask: Tensor | None, alpha: float, beta: float) -> Tensor:
    r"""Scores less the optimal value of the prompt, as its K responses estimate it (OAPL, A*-PO).

    .. math:: t_i = s_i - V, \qquad V = \beta \log \tfrac1K \sum_k e^{s_k / \beta}

    Args:
        scores: Scores of the data, in the unit of the implicit rewards. Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.
        alpha: Not used.
        beta: That of the implicit rewards, > 0.

    Returns:
        Targets of the implicit rewards. Shape (B, K).

    References:
        arXiv 2602.19362 (OAPL) and 2505.20686 (A*-PO).

    Example:
        >>> advantage_targets(torch.tensor([[1.0, 0.0]]), None, 0.0, 0.1)  # V is about the best score less beta * log 2
        tensor([[ 0.0693, -0.9307]])
    """
    real = _real(scores, response_mask)
    scores = scores.masked_fill(~real, -torch.inf)
    gaps = scores - scores.amax(dim=-1, keepdim=True)  # divided by a small beta they are -inf, whose exponential is 0
    log_k = real.sum(dim=-1, keepdim=True).to(scores.dtype).log()
    value = beta * (torch.logsumexp(gaps / beta, dim=-1, keepdim=True) - log_k)  # (B, 1), less the best score
    return (gaps - value).masked_fill(~real, 0.0)


def centered_targets(scores: Tensor, response_mask: Tensor | None, alpha: float, beta: float) -> Tensor:
    r"""Scores less their mean over the responses (GVPO): \(t_i = s_i - \bar s\).

    Args:
        scores: Scores of the data, in the unit of the implicit rewards. Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.
        alpha, beta: Not used.

    Returns:
        Targets of the centered rewards; each row sums to 0. Shape (B, K).
    """
    scores, real = real_values(scores, response_mask)
    return (scores - scores.sum(dim=-1, keepdim=True) / real.sum(dim=-1, keepdim=True)) * real


def rank_targets(scores: Tensor, response_mask: Tensor | None, alpha: float, beta: float) -> Tensor:
    """How many of the prompt's responses have a lower score: 0 for the worst; ties have the same number.

    Args:
        scores: Scores of the data; only their order counts. Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.
        alpha, beta: Not used.

    Returns:
        Ranks from below. Shape (B, K).
    """
    real = _real(scores, response_mask)
    lower = (scores[..., None, :] < scores[..., :, None]) & real[..., None, :]  # (B, K, K)
    return lower.sum(dim=-1).to(scores.dtype).masked_fill(~real, 0.0)


def gap_targets(scores: Tensor, response_mask: Tensor | None, alpha: float, beta: float) -> Tensor:
    r"""Gap of the log-ratios that IPO asks for, \(1 / (2 \beta)\), at the better response of a pair; ties share it.

    Args:
        scores: Scores of the data; only their order counts. Shape (B, 2).
        response_mask: True for real responses. Shape (B, K). Default: all real.
        alpha: Not used.
        beta: That of the implicit rewards, > 0: IPO's regularization tau.

    Returns:
        Targets. Shape (B, 2).
    """
    return reward_targets(scores, 0.0, response_mask) / (2 * beta)


def smoothed_labels(targets: Tensor, label_smoothing: float) -> Tensor:
    """Labels of pairs that are wrong with a probability: (1, 0) becomes (1 - label_smoothing, label_smoothing)."""
    return targets + label_smoothing * (1 - 2 * targets)


def real_values(values: Tensor, response_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values with 0 for padding, whatever stood there, and the mask as numbers. Both of shape (B, K)."""
    real = _real(values, response_mask)
    return values.masked_fill(~real, 0.0), real.to(values.dtype)


def _real(values: Tensor, response_mask: Tensor | None) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool) if response_mask is None else response_mask
