r"""The losses over K scored responses to one prompt.

Notation, used throughout `trl_nca`:

- B prompts, K responses to each (padded to the largest K of the batch; `response_mask` tells which are real),
- scores \(s_i\): the numbers in the data; targets \(w_i = \mathrm{softmax}(s / \alpha)_i\),
- implicit rewards \(r_i = \beta\,[\log \pi(y_i|x) - \log \pi_{ref}(y_i|x)]\), log-probs summed over the response's
  tokens.

Every function is pure, takes any leading shape in place of B, works in the dtype it is given (float32 or wider) and
returns one loss a prompt. The trainer averages them over the global batch.

Reference: Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv 2402.05369.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def reward_targets(scores: Tensor, alpha: float, response_mask: Tensor | None = None) -> Tensor:
    r"""Soft labels of the responses of each prompt: how much of the target policy's weight each one gets.

    .. math:: w_i = \mathrm{softmax}(s / \alpha)_i

    Args:
        scores: Scores of the data, any unit, higher is better. Shape (B, K).
        alpha: Temperature, in the unit of the scores, >= 0. Small is one-hot, large is uniform. 0 is the limit:
            one-hot on the best response; the best ones share the weight when they tie.
        response_mask: True for real responses. Shape (B, K). Default: all real.

    Returns:
        Targets; each row sums to 1 and padded responses get 0. Shape (B, K).

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
    rewards, real = _real_rewards(rewards, response_mask)
    noise = real / real.sum(dim=-1, keepdim=True)  # (B, K), 1/K over the real responses
    return -(targets * logsigmoid(rewards) + noise * logsigmoid(-rewards)).sum(dim=-1)


def dpo_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""DPO loss of a pair: InfoNCA with K = 2.

    .. math:: \ell = -w_1 \log \sigma(r_1 - r_2) - w_2 \log \sigma(r_2 - r_1)

    With the one-hot targets of a preference pair it is the familiar \(-\log\sigma(r_w - r_l)\); targets in between
    are DPO with label smoothing (conservative DPO).

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, 2).
        targets: Labels of the pair; each row sums to 1. Shape (B, 2).
        response_mask: True for real responses, two in each row. Shape (B, K). Default: all real.

    Returns:
        Loss of each pair. Shape (B,). At step 0 (policy == reference) it is log 2.

    Raises:
        ValueError: A prompt has more than two responses.

    References:
        Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.
    """
    _check_pairs("DPO", rewards, response_mask)
    return info_nca_loss(rewards, targets, response_mask)


def biased_nca_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""Biased NCA loss of a pair: only the worse response stands for the noise.

    .. math:: \ell = -\sum_i \Big[ w_i \log \sigma(r_i) + (1 - w_i) \log \sigma(-r_i) \Big]

    With one-hot targets: \(-\log\sigma(r_w) - \log\sigma(-r_l)\). NCA's noise term also holds the better response
    back, so this variant pushes it up without bound ("biased").

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, 2).
        targets: Labels of the pair; each row sums to 1. Shape (B, 2).
        response_mask: True for real responses, two in each row. Shape (B, K). Default: all real.

    Returns:
        Loss of each pair. Shape (B,). At step 0 (policy == reference) it is 2 log 2.

    Raises:
        ValueError: A prompt has more than two responses.

    References:
        The pairwise variant of the training scripts of arXiv 2402.05369.
    """
    _check_pairs("biasedNCA", rewards, response_mask)
    rewards, real = _real_rewards(rewards, response_mask)
    terms = targets * logsigmoid(rewards) + (1 - targets) * logsigmoid(-rewards)
    return -(real * terms).sum(dim=-1)


def _real_rewards(rewards: Tensor, response_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards with 0 for padding, whatever stood there, and the mask as numbers. Both of shape (B, K)."""
    if response_mask is None:
        return rewards, torch.ones_like(rewards)
    return rewards.masked_fill(~response_mask, 0.0), response_mask.to(rewards.dtype)


def _check_pairs(name: str, rewards: Tensor, response_mask: Tensor | None) -> None:
    pairs = rewards.shape[-1] == 2  # as wide as the longest row: to look into the mask would wait for the device
    if response_mask is not None and not pairs:
        pairs = bool((response_mask.sum(dim=-1) == 2).all())
    if not pairs:
        raise ValueError(f"{name} compares two responses a prompt; for more use NCA or InfoNCA")


#: The losses by the name a recipe gives them (`loss_type`), spelt as in the paper.
LOSSES = {"NCA": nca_loss, "InfoNCA": info_nca_loss, "DPO": dpo_loss, "biasedNCA": biased_nca_loss}

#: Those that are, for each prompt, a sum over its responses: a response's gradient needs no other's log-prob.
SEPARABLE = {"NCA", "biasedNCA"}
