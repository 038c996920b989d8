"""Summed log-probs of K responses to each prompt, by packed groups or by padded rows.

Legend: B prompts, K responses, N real responses in the batch, T packed tokens, R response tokens, L longest response,
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
        shared_prompt: Run packed, each prompt once; `share_prompts` must have said that it can. Else every response is
            run in a padded row of its own, behind its own copy of the prompt.

    Returns:
        Log-probs in nats, float32 or wider, 0 for padded responses. Shape (B, K).
    """
    logits = (_packed_logits if shared_prompt else _padded_logits)(model, batch)  # (R, V)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    per_token_logps = -cross_entropy(wide, batch["targets"], reduction="none")  # (R,)
    lengths = batch["response_lengths"]  # (B, K)
    owners = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(
        lengths.flatten()
    )  # (R,), b * K + k
    return per_token_logps.new_zeros(lengths.numel()).index_add(0, owners, per_token_logps).view(lengths.shape)


def _packed_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits that predict the targets, all groups in one row. Shape (R, V)."""
    context_lengths, response_lengths = batch["context_lengths"], batch["response_lengths"]
    device, num_responses = response_lengths.device, response_lengths.shape[1]
    is_response = torch.tensor([False] + [True] * num_responses, device=device).repeat(len(context_lengths))
    lengths = torch.cat([context_lengths[:, None], response_lengths], dim=1).flatten()
    return model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        # transformers hands a mask of four dimensions on as it is and builds none of its own: (T, T) would be large.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        group_layout=GroupLayout.of(context_lengths, response_lengths),
        logits_to_keep=is_response.repeat_interleave(lengths).nonzero().squeeze(1),  # only responses meet the LM head
        use_cache=False,
    ).logits[0]


def _padded_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The same with one padded row a response: contexts padded on the left, responses on the right. Shape (R, V)."""
    tokens = batch["input_ids"][0]
    groups = GroupLayout.of(batch["context_lengths"], batch["response_lengths"]).groups
    rows = [(tokens[context], tokens[response]) for context, responses in groups for response in responses]
    contexts = pad_sequence([c for c, _ in rows], batch_first=True, padding_value=-1, padding_side="left")
    responses = pad_sequence([r for _, r in rows], batch_first=True, padding_value=-1)  # (N, L)
    input_ids = torch.cat([contexts, responses], dim=1)  # (N, longest context + L)
    real = input_ids >= 0
    logits = model(
        input_ids=input_ids.clamp(min=0),
        position_ids=(real.cumsum(dim=1) - 1).clamp(min=0),
        attention_mask=real.long(),
        logits_to_keep=responses.shape[1],  # all responses begin in the same column
        use_cache=False,
    ).logits  # (N, L, V)
    return logits[responses >= 0]
