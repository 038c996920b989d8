"""The LM head fused with the log-softmax: log-probs of given tokens, without a (tokens, vocabulary) tensor.

trl 1.16 has a fused head too (`trl.trainer.utils.add_fused_lm_head`, which `DPOTrainer` puts on the model before ours).
It is not used because it projects every position on a CPU, and runs a frozen head, which LoRA's is, twice: forwards and
again for the gradient. `_FrozenHead` makes that gradient on the way forward.

Legend: R response tokens, H hidden size, V vocabulary.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from trl_nca.router import load_balancing_loss

#: Logits held at a time, in elements: 64 MiB of float32. Larger gains nothing, smaller loses matrix-product speed.
LOGITS_AT_ONCE = 2**24


def fuse_head(model: nn.Module) -> None:
    """Patches a causal language model so that `model(..., positions=, targets=)` returns log-probs in place of logits.

    `targets`, shape (R,), are token ids, and `positions`, shape (R,), the places in the flattened (batch x length) rows
    that predict them; the result is their log-probs, shape (R,). Only these positions are projected. Without
    `targets` the model runs as before. With `output_router_logits` a mixture of experts returns its load-balancing loss
    too. To be called on the bare model; wrapped by PEFT, DDP, FSDP or DeepSpeed it
    takes the two arguments all the same.
    """
    if hasattr(model.forward, "is_fused"):
        return
    original = model.forward
    to_logits = _logit_rule(model.config.get_text_config())

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: nn.Module, *args: Any, positions: Tensor | None = None, targets: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        # Looked up at each call: wrappers replace modules after this function has run.
        outputs = self.base_model(*args, **kwargs)
        hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
        head = self.get_output_embeddings()
        rows = max(1, LOGITS_AT_ONCE // self.config.get_text_config().vocab_size)
        logps = target_logps(lambda h: to_logits(head(h)), head, hidden, targets, rows)
        if kwargs.get("output_router_logits"):
            return logps, load_balancing_loss(self, outputs.router_logits, kwargs.get("attention_mask"))
        return logps

    forward.is_fused = True
    model.forward = types.MethodType(forward, model)


def _logit_rule(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What a model does to its head's output: Cohere and Granite scale it, Gemma 2 caps it, most do nothing."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    if getattr(config, "logits_scaling", None):
        multiplies = config.model_type == "hyperclovax"
        scale *= config.logits_scaling if multiplies else 1 / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def to_logits(output: Tensor) -> Tensor:
        logits = output * scale if scale != 1.0 else output
        return torch.tanh(logits / cap) * cap if cap else logits

    return to_logits


@torch.compiler.disable  # its pieces' number differs at every step, and their work is the products'
def target_logps(
    project: Callable[[Tensor], Tensor], head: nn.Module, hidden: Tensor, targets: Tensor, rows: int
) -> Tensor:
    """Log-probs of the targets, `rows` of them at a time; memory is (rows, V), whatever R is.

    Args:
        project: From hidden states, shape (n, H), to logits, shape (n, V).
        head: The module behind `project`; says whether its weights are trained.
        hidden: Hidden states that predict the targets. Shape (R, H).
        targets: Token ids. Shape (R,).
        rows: Tokens that are projected together.

    Returns:
        Log-probs in nats, float32 or wider. Shape (R,).
    """
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()):

        def score(h: Tensor, t: Tensor) -> Tensor:  # kept: hidden states alone; logits are made again for the gradient
            return checkpoint(_logps, project, h, t, use_reentrant=False, preserve_rng_state=False)

        pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([score(h, t) for h, t in pieces])
    return _FrozenHead.apply(hidden, targets, project, rows)


class _FrozenHead(torch.autograd.Function):
    """Log-probs whose gradient is made on the way forward, so that the logits are made once.

    Where the head is not trained, all that a loss sends back to a token is one number g, the derivative by its
    log-prob, and the gradient of its hidden state is g times a vector that is known in advance. Those vectors, shape
    (R, H), are kept; neither logits nor a second projection is needed.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        directions = torch.empty_like(hidden) if needs_gradient else None
        logps = []
        for at in range(0, len(targets), rows):
            part = slice(at, at + rows)
            with torch.set_grad_enabled(needs_gradient):
                h = hidden[part].detach().requires_grad_(needs_gradient)
                logits = project(h.view_as(h))  # (n, V); a view, for hooks on the head that do not take a leaf
            log_probs = torch.log_softmax(logits.detach(), dim=-1, dtype=_wide(logits))
            target = targets[part, None]
            logps.append(log_probs.gather(1, target).squeeze(1))
            if needs_gradient:  # of the target's log-prob by the logits: one-hot minus the probabilities
                slope = log_probs.exp_().neg_().scatter_add_(1, target, torch.ones_like(log_probs[:, :1]))
                (directions[part],) = torch.autograd.grad(logits, h, slope.to(logits.dtype))
        if needs_gradient:
            ctx.save_for_backward(directions)
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return gradient[:, None].to(directions.dtype) * directions, None, None, None


def _logps(project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    logits = project(hidden)  # (n, V)
    return -cross_entropy(logits.to(_wide(logits)), targets, reduction="none")  # (n,)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
