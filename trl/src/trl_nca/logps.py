"""Summed log-probs of K responses to each prompt, by packed groups or by padded rows.

Legend: B prompts, K responses, N real responses in the batch, T packed tokens, R response tokens, L padded length,
V vocabulary. The batch is that of `GroupCollator`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from trl_nca.shared_prompt import GroupLayout

Batch = dict[str, Tensor]


def response_logps(model: nn.Module, batch: Batch, shared_prompt: bool) -> Tensor:
    r"""Log-prob of each response given its prompt, summed over the response's tokens.

    .. math:: \log \pi(y | x) = \sum_t \log \pi(y_t | x, y_{<t})

    Args:
        model: A causal language model, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed).
        batch: Packed groups from `GroupCollator`.
        shared_prompt: Run packed, each prompt once; `share_prompts` must have said that it can. Else every
            response is run in a padded row of its own, behind its own copy of the prompt.

    Returns:
        Log-probs in nats, float32 or wider, 0 for padded responses. Shape (B, K).
    """
    per_token_logps, response_of_token = (_packed_logps if shared_prompt else _padded_logps)(model, batch)
    mask = batch["response_mask"]
    flat = per_token_logps.new_zeros(mask.numel()).index_add(0, response_of_token, per_token_logps)  # (B * K,)
    return flat.view(mask.shape)


def _packed_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per-token log-probs and the row b * K + k each token belongs to. Both of shape (R,)."""
    layout = GroupLayout.of(batch["prompt_lengths"], batch["response_lengths"])
    input_ids = batch["input_ids"]  # (1, T)
    device, num_responses = input_ids.device, batch["response_mask"].shape[1]
    predictors, targets, owners = [], [], []
    for b, (prompt, responses) in enumerate(layout.groups):
        for k, response in enumerate(responses):
            # The prompt's last token predicts the first token of every response.
            predictors += [prompt.stop - 1, *range(response.start, response.stop - 1)]
            targets += range(response.start, response.stop)
            owners += [b * num_responses + k] * (response.stop - response.start)
    logits = model(
        input_ids=input_ids,
        position_ids=batch["position_ids"],
        # transformers hands a mask of four dimensions on as it is and builds none of its own: (T, T) would be large.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        group_layout=layout,
        logits_to_keep=torch.tensor(predictors, device=device),
        use_cache=False,
    ).logits[0]  # (R, V): only response tokens meet the LM head
    targets = input_ids[0, torch.tensor(targets, device=device)]  # (R,)
    return _token_logps(logits, targets), torch.tensor(owners, device=device)


def _padded_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same with one padded row a response: prompts padded on the left, responses on the right."""
    rows, owners = [], []
    layout = GroupLayout.of(batch["prompt_lengths"], batch["response_lengths"])
    for b, (prompt, responses) in enumerate(layout.groups):
        for k, response in enumerate(responses):
            rows.append((batch["input_ids"][0, prompt], batch["input_ids"][0, response]))
            owners.append(b * batch["response_mask"].shape[1] + k)
    prompts = pad_sequence([p for p, _ in rows], batch_first=True, padding_value=-1, padding_side="left")
    responses = pad_sequence([r for _, r in rows], batch_first=True, padding_value=-1)  # (N, longest response)
    input_ids = torch.cat([prompts, responses], dim=1)  # (N, L)
    real = input_ids >= 0
    logits = model(
        input_ids=input_ids.clamp(min=0),
        position_ids=(real.cumsum(dim=1) - 1).clamp(min=0),
        attention_mask=real.long(),
        # All responses start in the same column, so one slice holds every position that predicts a response token.
        logits_to_keep=responses.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]  # (N, longest response, V)
    is_token = responses >= 0
    owner_of_token = torch.tensor(owners, device=input_ids.device)[:, None].expand_as(responses)
    return _token_logps(logits[is_token], responses[is_token]), owner_of_token[is_token]


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of the targets, shape (R,), from logits of shape (R, V), in float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -cross_entropy(wide, targets, reduction="none")
