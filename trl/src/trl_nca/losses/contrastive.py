r"""The losses of arXiv 2402.05369 over K scored responses: InfoNCA and NCA. For the notation see `trl_nca.losses`."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_nca.losses.targets import real_values


def info_nca_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""InfoNCA loss: cross-entropy between the targets and the policy's own ranking of the K responses.

    .. math:: \ell = -\sum_i w_i \log \mathrm{softmax}(r)_i, \qquad
              \partial\ell/\partial r_i = \mathrm{softmax}(r)_i - w_i

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, K).
        targets: Labels from `reward_targets`; each row sums to 1. Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.

    Returns:
        Loss of each prompt. Shape (B,). At step 0 (policy == reference) it is log K. Only differences of rewards
        count: adding a constant to a row changes nothing.

    References:
        arXiv 2402.05369, section 3. DPO is the case K = 2 with one-hot targets.
    """
    if response_mask is not None:
        rewards = rewards.masked_fill(~response_mask, -torch.inf)
    log_ranking = torch.log_softmax(rewards, dim=-1)  # (B, K)
    if response_mask is not None:
        log_ranking = log_ranking.masked_fill(~response_mask, 0.0)  # 0 * -inf would be NaN
    return -(targets * log_ranking).sum(dim=-1)


def nca_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""NCA loss: tell each response from noise drawn from the reference policy.

    .. math:: \ell = -\sum_i \Big[ w_i \log \sigma(r_i) + \tfrac{1}{K} \log \sigma(-r_i) \Big], \qquad
              \partial\ell/\partial r_i = \sigma(r_i) / K - w_i\,\sigma(-r_i)

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, K).
        targets: Labels from `reward_targets`; each row sums to 1. Shape (B, K).
        response_mask: True for real responses. Shape (B, K). Default: all real.

    Returns:
        Loss of each prompt. Shape (B,). At step 0 (policy == reference) it is 2 log 2, whatever K is. The rewards
        count by themselves, not by their differences: that is what keeps the likelihood of good responses up.

    References:
        arXiv 2402.05369, section 4.
    """
    rewards, real = real_values(rewards, response_mask)
    noise = real / real.sum(dim=-1, keepdim=True)  # (B, K), 1/K over the real responses
    return -(targets * logsigmoid(rewards) + noise * logsigmoid(-rewards)).sum(dim=-1)
