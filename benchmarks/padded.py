"""The practice of 2024, as a plain reference: K padded copies of prompt and response, float32 logits everywhere.

Legend: K responses, L longest row of the batch, V vocabulary.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from trl_nca.losses import nca_loss, reward_targets


def padded_logps(model: torch.nn.Module, row: dict[str, Any], device: str) -> Tensor:
    """Summed log-probs of a row's responses. Shape (K,)."""
    prompt = row["prompt_ids"]
    length = len(prompt) + max(map(len, row["response_ids"]))
    input_ids = torch.zeros(len(row["response_ids"]), length, dtype=torch.long)
    is_response = torch.zeros_like(input_ids, dtype=torch.bool)
    attention_mask = torch.zeros_like(input_ids)
    counts = row.get("token_masks") or [[True] * len(response) for response in row["response_ids"]]
    for k, response in enumerate(row["response_ids"]):
        end = len(prompt) + len(response)
        input_ids[k, :end] = torch.tensor(prompt + response)
        attention_mask[k, :end] = 1
        is_response[k, len(prompt) : end] = torch.tensor(counts[k])
    input_ids, attention_mask, is_response = (t.to(device) for t in (input_ids, attention_mask, is_response))
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.float()  # (K, L, V)
    logps = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)  # (K, L - 1)
    return (logps * is_response[:, 1:]).sum(-1)


def padded_loss(model: PeftModel, row: dict[str, Any], beta: float, alpha: float, device: str) -> Tensor:
    """NCA loss of a row, the reference run beside the policy."""
    logps = padded_logps(model, row, device)
    with torch.no_grad(), model.disable_adapter():
        ref_logps = padded_logps(model, row, device)
    scores = torch.tensor([row["scores"]], device=device)
    return nca_loss(beta * (logps - ref_logps)[None], reward_targets(scores, alpha)).mean()
