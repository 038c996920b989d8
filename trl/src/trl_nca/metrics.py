"""What is logged of each prompt: implicit rewards by rank of score, accuracy, margin, log-probs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def group_metrics(
    losses: Tensor,
    rewards: Tensor,
    logps: Tensor,
    scores: Tensor,
    response_mask: Tensor,
    ref_logps: Tensor | None = None,
) -> dict[str, Tensor]:
    """Metrics of each prompt of a batch, to be averaged over all prompts that have them.

    Chosen is the response with the highest score (the first of them on a tie), rejected the mean of the rest.

    Args:
        losses: Loss of each prompt. Shape (B,).
        rewards: Implicit rewards beta * (logps - ref_logps). Shape (B, K).
        logps: Summed log-probs under the policy, in nats. Shape (B, K).
        scores: Scores of the data. Shape (B, K).
        response_mask: True for real responses, at least two in each row. Shape (B, K).
        ref_logps: Summed log-probs under the reference, in nats; None without one. Shape (B, K).

    Returns:
        Tensors of shape (B,), float32, under TRL's names: `loss`, `rewards/chosen`, `rewards/rejected`,
        `rewards/margins`, `rewards/accuracies` (share of the rest that chosen beats, a tie counting a half: 0.5 at step
        0), `logps/chosen`, `logps/rejected`, with a reference `logratios/chosen`: `logps/chosen` less the reference's,
        0 at step 0, and `rewards/rank_0` (best score) to `rewards/rank_{K-1}`, NaN where a
        prompt has fewer responses.

    Example:
        >>> one = torch.ones(1)
        >>> rewards, mask = torch.tensor([[1.0, 4.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> metrics = group_metrics(one, rewards, rewards, torch.tensor([[7.0, 9.0, 5.0]]), mask)
        >>> metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item(), metrics["rewards/rank_1"].item()
        (4.0, 1.5, 1.0)
    """
    order = scores.masked_fill(~response_mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)  # (B, K)
    real = response_mask.gather(-1, order)
    rewards = rewards.detach().float().gather(-1, order)  # (B, K), best score first
    logps = logps.detach().float().gather(-1, order)
    rest = real.float()
    rest[:, 0] = 0
    num_rest = rest.sum(dim=-1)

    def mean_of_rest(values: Tensor) -> Tensor:
        return (values * rest).sum(dim=-1) / num_rest

    chosen, rejected = rewards[:, 0], mean_of_rest(rewards)
    half = torch.full_like(rewards, 0.5)  # step(chosen - other), a half where they are equal
    metrics = {
        "loss": losses.detach().float(),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": mean_of_rest(torch.heaviside(chosen[:, None] - rewards, half)),
        "logps/chosen": logps[:, 0],
        "logps/rejected": mean_of_rest(logps),
    }
    if ref_logps is not None:
        metrics["logratios/chosen"] = logps[:, 0] - ref_logps.float().gather(-1, order)[:, 0]
    ranked = rewards.masked_fill(~real, torch.nan)
    return metrics | {f"rewards/rank_{k}": ranked[:, k] for k in range(ranked.shape[1])}


def stack_metrics(batches: Sequence[dict[str, Tensor]]) -> tuple[list[str], Tensor]:
    """The metrics of several batches as one table.

    Args:
        batches: From `group_metrics`, with further metrics of shape (B,) before those by rank. K may differ by batch.

    Returns:
        The names of the columns before `rewards/rank_0`, and the table, with NaN where a batch has fewer responses.
        Shape (prompts, metrics).
    """
    width = max(map(len, batches))
    tables = [torch.stack(list(metrics.values()), dim=1) for metrics in batches]
    table = torch.cat([pad(t, (0, width - t.shape[1]), value=torch.nan) for t in tables])
    return [name for name in batches[0] if not name.startswith("rewards/rank_")], table
