r"""Losses that regress implicit rewards on what the scores ask for. For the notation see `trl_nca.losses`."""

from torch import Tensor

from trl_nca.losses.targets import real_values


def regression_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""QRPO's and OAPL's loss, which differ in their targets: squared error, averaged over the K responses.

    .. math:: \ell = \tfrac1K \sum_i (t_i - r_i)^2, \qquad \partial\ell/\partial r_i = \tfrac2K (r_i - t_i)

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, K).
        targets: Of the implicit rewards: `quantile_targets` (QRPO) or `advantage_targets` (OAPL). Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.

    Returns:
        Loss of each prompt. Shape (B,). The rewards count by themselves, not by their differences.

    References:
        QRPO: arXiv 2507.08068. OAPL: arXiv 2602.19362; A*-PO: arXiv 2505.20686.
    """
    rewards, real = real_values(rewards, response_mask)
    return (real * (targets - rewards).square()).sum(dim=-1) / real.sum(dim=-1)


def gvpo_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""GVPO loss: squared error between rewards and scores, each less its mean over the K responses.

    .. math:: \ell = \tfrac{1}{K - 1} \sum_i \big[ (r_i - \bar r) - (s_i - \bar s) \big]^2

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, K).
        targets: Centered scores from `centered_targets`. Shape (B, K).
        response_mask: True for real responses, at least two in each row. Shape (B, K). Default: all real.

    Returns:
        Loss of each prompt. Shape (B,). Only differences of rewards count. Of a pair it is half of REBEL's,
        \([(r_1 - r_2) - (s_1 - s_2)]^2\).

    References:
        Zhang et al., Group Variance Policy Optimization, arXiv 2504.19599.
    """
    rewards, real = real_values(rewards, response_mask)
    num_real = real.sum(dim=-1, keepdim=True)
    centered = rewards - rewards.sum(dim=-1, keepdim=True) / num_real  # (B, K)
    return (real * (centered - targets).square()).sum(dim=-1) / (num_real.squeeze(-1) - 1)
