"""Tiny models of several families, and a step of the engine on them."""

import contextlib

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny import SIZES, tiny_config
from trl_nca.chunks import NO_MORE, logps_for_training, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps
from trl_nca.loss_config import LossConfig
from trl_nca.losses import LOSSES
from trl_nca.objective import make_targets, prompt_losses
from trl_nca.pieces import WHOLE

FAMILIES = {
    "llama": (LlamaForCausalLM, tiny_config()),
    "mistral-window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    ),
}


def make(family):
    torch.manual_seed(0)
    model_class, config = FAMILIES[family]
    return model_class(config).double()


def make_model(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout)
    model = get_peft_model(LlamaForCausalLM(tiny_config()), lora).to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    prepare([model])
    return model.train()


def plain_logps(model, rows):
    """Log-probs by the plain forward, a response at a time, summed over the tokens that count."""
    logps = []
    for row in rows:
        masks = row.get("token_masks") or [[True] * len(ids) for ids in row["response_ids"]]
        for ids, mask in zip(row["response_ids"], masks, strict=True):
            whole = torch.tensor([row["prompt_ids"] + ids])
            predicted = model(input_ids=whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            logps.append(predicted[range(len(ids)), ids][torch.tensor(mask)].sum())
    return torch.stack(logps)


def hold_against_plain(model, rows, shared_prompt, atol=1e-5):
    """Holds log-probs, and the gradient of a weighted sum of them, against those of the plain forward."""
    trained, expected = [*model.parameters()], plain_logps(model, rows)
    weights = torch.linspace(-1, 1, len(expected), dtype=expected.dtype)
    expected_gradient = torch.autograd.grad(weights @ expected, trained)
    prepare([model], str(shared_prompt).lower())
    batch = GroupCollator()(rows)
    logps = response_logps(model, batch, shared_prompt)[batch["response_mask"]]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(weights @ logps, trained), expected_gradient, rtol=1e-4, atol=atol)


def losses_of(loss_type, batch, beta=0.05, **settings):
    """The losses of a batch's prompts as a function of its log-probs."""
    args = LossConfig(loss_type=loss_type, beta=beta, alpha=0.3, **settings)
    args.check_loss()
    scores = batch["scores"]
    ref_logps = torch.linspace(-40, -20, scores.numel(), device=scores.device).view(scores.shape)
    batch = {"mean_best_length": batch["best_length"] / len(scores)} | batch
    targets = make_targets(scores, batch["response_mask"], args)
    return lambda logps: prompt_losses(logps, batch, ref_logps, targets, args)[0]


def step(
    model, batch, loss_type, most, at_least=NO_MORE, no_sync=contextlib.nullcontext, runs=None, shared_prompt=True,
    cutting=WHOLE, **settings,
):  # fmt: skip
    """Back-propagates a batch in chunks of `most` tokens; returns its log-probs."""
    loss = losses_of(loss_type, batch, **settings)

    def run(chunk):
        if runs is not None:
            runs.append((torch.is_grad_enabled(), chunk["input_ids"].shape[1]))
        return response_logps(model, chunk, shared_prompt)

    logps = logps_for_training(
        run,
        split_batch(batch, most, shared_prompt, cutting),
        separable=LOSSES[loss_type].separable,
        backward=lambda logps: loss(logps).sum().backward(),
        no_sync=no_sync,
        at_least=at_least,
    )
    loss(logps).sum().backward()
    return logps.detach()
