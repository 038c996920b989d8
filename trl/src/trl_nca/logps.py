"""Summed log-probs of K responses to each prompt, by packed groups or by padded rows.

Legend: B prompts, K responses, N real responses in the batch, T packed tokens, R response tokens, L longest response,
V vocabulary. The batch is that of `GroupCollator`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl_nca.head import fuse_head
from trl_nca.layers import fuse_layers
from trl_nca.router import RouterLoss
from trl_nca.shared_prompt import GroupLayout, base_model, share_prompts

Batch = dict[str, Any]  # tensors, and the rows' places


def prepare(models: Sequence[nn.Module], shared_prompt: str = "auto") -> bool:
    """Makes models ready for `response_logps`. Sampling, and any other use of them, is as before.

    Args:
        models: Policy and, where it is a model of its own, reference; bare or wrapped by PEFT.
        shared_prompt: "true", "false", or "auto": true where the models can, else a warning.

    Returns:
        What to pass to `response_logps` as `shared_prompt`.

    Raises:
        ValueError: "true" was asked for and a model cannot; says why.
    """
    for model in models:
        fuse_head(base_model(model))
        fuse_layers(model)
    return share_prompts(models, shared_prompt)


def response_logps(model: nn.Module, batch: Batch, shared_prompt: bool, router: RouterLoss | None = None) -> Tensor:
    r"""Log-prob of each response given its prompt, summed over the response's tokens.

    .. math:: \log \pi(y | x) = \sum_t \log \pi(y_t | x, y_{<t})

    Args:
        model: A causal language model after `prepare`, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed).
        batch: Packed groups from `GroupCollator`.
        shared_prompt: What `prepare` said. True: run packed, each prompt once. False: every response is run in a padded
            row of its own, behind its own copy of the prompt.
        router: Where it is enabled, the load-balancing loss of this forward is added to it.

    Returns:
        Log-probs in nats, float32 or wider, 0 for padded responses. Shape (B, K).
    """
    inputs, positions = (_packed if shared_prompt else _padded)(batch)
    if router is not None and router.enabled:
        inputs["output_router_logits"] = True
    per_token_logps = model(**inputs, use_cache=False, positions=positions, targets=batch["targets"])  # (R,)
    if router is not None and router.enabled:
        per_token_logps, balance = per_token_logps
        router.add(batch, balance)
    lengths = batch["response_lengths"].flatten()  # (B * K,)
    owners = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # (R,), b * K + k
    logps = per_token_logps.new_zeros(len(lengths)).index_add(0, owners, per_token_logps)
    return logps.view(batch["response_lengths"].shape)


def _packed(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """All groups in one row: the model's inputs, and the positions in it that predict the targets, shape (R,)."""
    context_lengths, response_lengths = batch["context_lengths"], batch["response_lengths"]
    device, num_responses = response_lengths.device, response_lengths.shape[1]
    is_response = torch.tensor([False] + [True] * num_responses, device=device).repeat(len(context_lengths))
    lengths = torch.cat([context_lengths[:, None], response_lengths], dim=1).flatten()
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        # transformers hands a mask of four dimensions on as it is and builds none of its own: (T, T) would be large.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "group_layout": GroupLayout.of(context_lengths, response_lengths),
    }
    return inputs, is_response.repeat_interleave(lengths).nonzero().squeeze(1)


def _padded(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """The same with one padded row a response: contexts padded on the left, responses on the right."""
    tokens = batch["input_ids"][0]
    groups = GroupLayout.of(batch["context_lengths"], batch["response_lengths"]).groups
    rows = [(tokens[context], tokens[response]) for context, responses in groups for response in responses]
    contexts = pad_sequence([c for c, _ in rows], batch_first=True, padding_value=-1, padding_side="left")
    responses = pad_sequence([r for _, r in rows], batch_first=True, padding_value=-1)  # (N, L)
    input_ids = torch.cat([contexts, responses], dim=1)  # (N, longest context + L)
    real = input_ids >= 0
    inputs = {
        "input_ids": input_ids.clamp(min=0),
        "position_ids": (real.cumsum(dim=1) - 1).clamp(min=0),
        "attention_mask": real.long(),
    }
    scored = torch.cat([torch.zeros_like(contexts, dtype=torch.bool), responses >= 0], dim=1)
    return inputs, scored.flatten().nonzero().squeeze(1)
