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
from trl_nca.layout import GroupLayout
from trl_nca.router import RouterLoss
from trl_nca.shared_prompt import base_model, share_prompts

Batch = dict[str, Any]  # tensors, the layout, and the rows' locations


def patch_models(models: Sequence[nn.Module], shared_prompt: str = "auto") -> bool:
    """Patches models in place so that `response_logps` can run them. Sampling, and any other use, is as before.

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
        model: A causal language model after `patch_models`, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed).
        batch: Packed groups from `GroupCollator`.
        shared_prompt: What `patch_models` returned. True: run packed, each prompt once. False: every response is run in
            a padded row of its own, behind its own copy of the prompt.
        router: Where it is enabled, the load-balancing loss of this forward is added to it.

    Returns:
        Log-probs in nats, float32 or wider, 0 for padded responses. Shape (B, K).
    """
    inputs = model_inputs(batch, shared_prompt)
    if router is not None and router.enabled:
        inputs["output_router_logits"] = True
    per_token_logps = model(**inputs)  # (R,)
    if router is not None and router.enabled:
        per_token_logps, balance = per_token_logps
        router.add(batch, balance)
    response_index = _layout(batch).response_index  # (R,)
    logps = per_token_logps.new_zeros(batch["scores"].numel()).index_add(0, response_index, per_token_logps)
    return logps.view(batch["scores"].shape)


def model_inputs(batch: Batch, shared_prompt: bool) -> dict[str, Any]:
    """Keyword arguments of the patched model's forward for a batch. For the arguments see `response_logps`."""
    inputs = (_packed if shared_prompt else _padded)(batch)
    return inputs | {"targets": batch["targets"], "use_cache": False}


def _layout(batch: Batch) -> GroupLayout:
    """The layout of the batch, with its tensors where the tokens are."""
    return batch["layout"].to(batch["input_ids"].device)


def _packed(batch: Batch) -> dict[str, Any]:
    """All groups in one row. `positions`, shape (R,), are those in it that predict the targets."""
    layout = _layout(batch)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        # transformers hands a mask of four dimensions on as it is and builds none of its own: (T, T) would be large.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.device),
        "group_layout": layout,
        "positions": layout.target_positions,
    }


def _padded(batch: Batch) -> dict[str, Any]:
    """One padded row a response: contexts padded on the left, responses on the right."""
    tokens, groups = batch["input_ids"][0], batch["layout"].groups
    rows = [(tokens[context], tokens[response]) for context, responses in groups for response in responses]
    contexts = pad_sequence([c for c, _ in rows], batch_first=True, padding_value=-1, padding_side="left")
    responses = pad_sequence([r for _, r in rows], batch_first=True, padding_value=-1)  # (N, L)
    input_ids = torch.cat([contexts, responses], dim=1)  # (N, longest context + L)
    real = input_ids >= 0
    # The positions that predict targets are known from the lengths: to look for them would wait for the device.
    length, start = input_ids.shape[1], contexts.shape[1]
    spans = [(row * length + start, len(response)) for row, (_, response) in enumerate(rows)]
    positions = torch.cat([torch.arange(first, first + count) for first, count in spans])  # (R,)
    return {
        "input_ids": input_ids.clamp(min=0),
        "position_ids": (real.cumsum(dim=1) - 1).clamp(min=0),
        "attention_mask": real.long(),
        "positions": positions.to(tokens.device, non_blocking=True),
    }
