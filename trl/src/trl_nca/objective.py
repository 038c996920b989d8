"""From the log-probs of a batch to the losses of its prompts, as the settings of a run say.

Legend: B prompts, K responses. A batch is that of `GroupCollator`.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from trl_nca.logps import Batch
from trl_nca.loss_config import LossConfig
from trl_nca.losses.targets import smoothed_labels


def make_targets(scores: Tensor, response_mask: Tensor, args: LossConfig, pairs: bool = False) -> Tensor:
    """What the loss learns from.

    Args:
        scores: Scores of the data, or 1 and 0 of a preference pair. Shape (B, K).
        response_mask: True for real responses. Shape (B, K).
        args: loss_type, alpha, beta, tie_break, label_smoothing.
        pairs: Whether the scores are of preference pairs, which are sure: alpha and tie_break do not count.

    Returns:
        Targets of the responses. Shape (B, K).
    """
    alpha = 0.0 if pairs else args.alpha
    if args.tie_break and not pairs:
        scores = scores.clone()
        scores[:, 0] += args.tie_break
    targets = args.loss.targets(scores, response_mask, alpha, args.beta)
    if args.label_smoothing:
        targets = smoothed_labels(targets, args.label_smoothing) * response_mask
    return targets


def prompt_losses(
    logps: Tensor, batch: Batch, ref_logps: Tensor, targets: Tensor, args: LossConfig
) -> tuple[Tensor, Tensor]:
    r"""The losses of a batch, and the implicit rewards in them.

    .. math:: r_i = \beta\,[\log \pi(y_i|x) - \log \pi_{ref}(y_i|x)] \quad \text{or, a token,} \quad r_i / |y_i|

    Args:
        logps: Summed log-probs of the responses, in nats. Shape (B, K).
        batch: `scores`, `response_mask`, `response_lengths`; `weight`, where the rows have one; in training
            `mean_best_length`, the mean number of tokens of the best responses of the global batch.
        ref_logps: Those under the reference; 0 without one. Shape (B, K).
        targets: From `make_targets`. Shape (B, K).
        args: loss_type, beta, normalize, margin, sft_weight.

    Returns:
        Losses, times the rows' weights, shape (B,), and implicit rewards, shape (B, K).
    """
    mask = batch["response_mask"]
    rewards = args.beta * (logps - ref_logps)
    if args.per_token:
        rewards = rewards / batch["response_lengths"].clamp(min=1)
    compared = rewards
    if args.margin_of_best:
        compared = rewards - args.margin_of_best * _best(batch["scores"], mask).to(rewards.dtype)
    losses = args.loss.loss(compared, targets.to(rewards.dtype), mask)
    if args.sft_weight:
        best = _best(batch["scores"], mask)
        nll = -(logps * best).sum(dim=-1)  # (B,)
        # While evaluating there is no global batch, and what a prompt adds must not depend on its neighbours.
        num_tokens = batch.get("mean_best_length", (best * batch["response_lengths"]).sum(dim=-1))
        losses = losses + args.sft_weight * nll / num_tokens
    if "weight" in batch:
        losses = losses * batch["weight"]
    return losses, rewards


def _best(scores: Tensor, response_mask: Tensor) -> Tensor:
    """1 at the response with the highest score, the first of them on a tie. Shape (B, K)."""
    return one_hot(scores.masked_fill(~response_mask, -torch.inf).argmax(dim=-1), scores.shape[-1])
