r"""The likelihood of the whole ranking of K responses (Plackett-Luce). For the notation see `trl_nca.losses`."""

import torch
from torch import Tensor

from trl_nca.losses.targets import real_values


def plackett_luce_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""Plackett-Luce loss: minus the log-likelihood of the responses' order, drawn from the best down.

    .. math:: \ell = -\sum_i \Big[ r_i - \log \sum_{j : t_j \le t_i} c_{ij}\, e^{r_j} \Big], \qquad c_{ij} = 1
              \text{ where } t_j < t_i, \quad 1 - n_i / m_i \text{ where } t_j = t_i

    Of m responses that tie, the n-th to be drawn (n = 0, ..., m - 1) has each of the m still there with probability
    1 - n / m: Efron's rule, which gives all of them the same gradient.

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, K).
        targets: Ranks from `rank_targets`, or any numbers in the order of the scores. Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.

    Returns:
        Loss of each prompt. Shape (B,). At step 0 (policy == reference) it is log K!, ties or not. Only differences of
        rewards count.

    References:
        Rafailov et al., arXiv 2305.18290, appendix A.3; its pair is DPO. Efron, The Efficiency of Cox's Likelihood
        Function for Censored Data, 1977.
    """
    rewards, real = real_values(rewards, response_mask)
    there = real[..., None, :] > 0  # (B, K, K): the row's response is i, the column's j
    tied = (targets[..., None, :] == targets[..., :, None]) & there
    lower = (targets[..., None, :] < targets[..., :, None]) & there
    drawn_before = tied.tril(-1).sum(dim=-1) / tied.sum(dim=-1).clamp(min=1)  # (B, K), n / m in the row's order
    left = lower + tied * (1 - drawn_before[..., None])  # (B, K, K), the c of the equation
    # A padded response has no one to be drawn from: the log of 0 would be its loss.
    left = torch.where(real[..., None] > 0, left, torch.ones_like(left)).to(rewards.dtype)
    normalizers = torch.logsumexp(rewards[..., None, :] + left.log(), dim=-1)  # (B, K)
    return -(real * (rewards - normalizers)).sum(dim=-1)
