r"""Losses that compare the two responses of a pair. For the notation see `trl_nca.losses`."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_nca.losses.contrastive import info_nca_loss
from trl_nca.losses.targets import real_values


def dpo_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""DPO loss of a pair: InfoNCA with K = 2.

    .. math:: \ell = -w_1 \log \sigma(r_1 - r_2) - w_2 \log \sigma(r_2 - r_1)

    With the one-hot targets of a preference pair it is the familiar \(-\log\sigma(r_w - r_l)\); with smoothed labels it
    is conservative DPO; with log-probs per token, no reference and a margin it is SimPO.

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, 2).
        targets: Labels of the pair; each row sums to 1. Shape (B, 2).
        response_mask: True for real responses, two in each row. Shape (B, K). Default: all real.

    Returns:
        Loss of each pair. Shape (B,). At step 0 (policy == reference) it is log 2.

    Raises:
        ValueError: A prompt has more than two responses.

    References:
        Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7. SimPO: Meng et al.,
        arXiv 2405.14734.
    """
    check_pairs("DPO", rewards, response_mask)
    return info_nca_loss(rewards, targets, response_mask)


def robust_dpo_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""Robust DPO loss of a pair: unbiased where each label is wrong with probability \(\epsilon\).

    .. math:: \ell = \frac{-(1 - \epsilon) \log \sigma(r_w - r_l) + \epsilon \log \sigma(r_l - r_w)}{1 - 2 \epsilon}

    Args:
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, 2).
        targets: Labels of the pair, \(1 - \epsilon\) and \(\epsilon\); ties are not corrected. Shape (B, 2).
        response_mask: True for real responses, two in each row. Shape (B, K). Default: all real.

    Returns:
        Loss of each pair. Shape (B,). At step 0 (policy == reference) it is log 2. It may be negative.

    Raises:
        ValueError: A prompt has more than two responses.

    References:
        Chowdhury et al., Provably Robust DPO, arXiv 2403.00409; TRL's `robust`.
    """
    check_pairs("robustDPO", rewards, response_mask)
    certainty = 2 * targets.amax(dim=-1, keepdim=True) - 1  # (B, 1), 1 - 2 epsilon; 0 where they tie
    certainty = torch.where(certainty > 0, certainty, torch.ones_like(certainty))
    clean = 0.5 + (targets - 0.5) / certainty.square()  # (B, 2), (1 - epsilon, -epsilon) / (1 - 2 epsilon)
    return info_nca_loss(rewards, clean, response_mask)


def ipo_loss(rewards: Tensor, targets: Tensor, response_mask: Tensor | None = None) -> Tensor:
    r"""IPO loss of a pair: squared error of the gap between its log-ratios, which is to be \(1 / (2 \beta)\).

    .. math:: \ell = \Big( \frac{r_w - r_l}{\beta} - \frac{1}{2 \beta} \Big)^2

    Args:
        rewards: Implicit rewards, a token: beta * (logps - ref_logps) / tokens. Shape (B, 2).
        targets: The gap at the better response, from `gap_targets`. Shape (B, 2).
        response_mask: True for real responses, two in each row. Shape (B, K). Default: all real.

    Returns:
        Loss of each pair. Shape (B,). At step 0 (policy == reference) it is 1 / (4 beta^2); 0 where the scores tie.

    Raises:
        ValueError: A prompt has more than two responses.

    References:
        Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036,
        equation 17, on log-ratios a token as its authors told TRL.
    """
    check_pairs("IPO", rewards, response_mask)
    rewards, real = real_values(rewards, response_mask)
    half_gaps = real * (targets - targets.sum(dim=-1, keepdim=True) / 2)  # (B, K), +-1 / (4 beta); 0 where they tie
    return (4 * (half_gaps * rewards).sum(dim=-1) - half_gaps.abs().sum(dim=-1)).square()


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
        The pairwise variant of the training scripts of arXiv 2402.05369; TRL's `bco_pair`.
    """
    check_pairs("biasedNCA", rewards, response_mask)
    rewards, real = real_values(rewards, response_mask)
    terms = targets * logsigmoid(rewards) + (1 - targets) * logsigmoid(-rewards)
    return -(real * terms).sum(dim=-1)


def check_pairs(name: str, rewards: Tensor, response_mask: Tensor | None) -> None:
    """Ends a step whose loss is for pairs, on prompts with more responses.

    Raises:
        ValueError: A prompt has not two.
    """
    pairs = rewards.shape[-1] == 2  # as wide as the longest row: to look into the mask would wait for the device
    if response_mask is not None and not pairs:
        pairs = bool((response_mask.sum(dim=-1) == 2).all())
    if not pairs:
        raise ValueError(f"{name} compares two responses a prompt; for more use NCA or InfoNCA")
