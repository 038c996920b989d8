"""The LM head fused with the log-softmax: log-probs of given tokens, without a (tokens, vocabulary) tensor.

trl 1.16 has a fused head too (`trl.trainer.utils.add_fused_lm_head`, which `DPOTrainer` puts on the model before ours).
It is not used because it projects every position on a CPU, and runs a frozen head, which LoRA's is, twice: forwards and
again for the gradient. `_FrozenHead` makes that gradient on the way forward.

Legend: R response tokens, H hidden size, V vocabulary.
"""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from trl_nca.layout import padded_inputs
from trl_nca.rotary import length_dependent, longest_shared, rotating_by_row
from trl_nca.router import load_balancing_loss

#: Logits held at a time, in elements: 64 MiB of float32. Larger gains nothing, smaller loses matrix-product speed.
LOGITS_AT_ONCE = 2**24


def fuse_head(model: nn.Module) -> None:
    """Patches a causal language model so that `model(..., positions=, targets=)` returns log-probs in place of logits.

    `targets`, shape (R,), are token ids, and `positions`, shape (R,), the places in the flattened rows, of `row_length`
    tokens (default: of those that run), that predict them; the result is their log-probs, shape (R,). Only these
    positions are projected. Without `targets` the model runs as before. With `output_router_logits` a mixture of
    experts returns its load-balancing loss too. To be called on the bare model; wrapped by PEFT, DDP, FSDP or DeepSpeed
    it takes the arguments all the same.
    """
    if hasattr(model.forward, "is_fused"):
        return
    original, decoder, rotary = model.forward, _decoder_name(model), length_dependent(model)

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: nn.Module,
        *args: Any,
        positions: Tensor | None = None,
        row_length: int | None = None,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        layout = kwargs.get("group_layout")
        if rotary and layout is not None and layout.longest >= longest_shared(rotary):
            _warn_of_length(longest_shared(rotary))
            kwargs |= padded_inputs(kwargs["input_ids"][0], layout) | {"group_layout": None}
            positions, row_length = kwargs.pop("positions"), kwargs.pop("row_length")
            layout = None
        if rotary and layout is None:
            kwargs["position_ids"] = kwargs["attention_mask"].cumsum(1) - 1  # padding repeats a row's last position
        with rotating_by_row(rotary):
            # Looked up at each call: wrappers replace modules after this function has run.
            outputs = getattr(self, decoder)(*args, **kwargs)
        states = outputs.last_hidden_state  # (rows, length, H)
        if row_length not in (None, states.shape[1]):  # PEFT's prompt tuning puts virtual tokens before each row
            positions = positions + (positions // row_length + 1) * (states.shape[1] - row_length)
        hidden = states.flatten(0, 1)[positions]
        rest = [child for name, child in self.named_children() if name != decoder]
        trained = any(p.requires_grad for child in rest for p in child.parameters())
        rows = max(1, LOGITS_AT_ONCE // self.config.get_text_config().vocab_size)
        logps = target_logps(functools.partial(_project, self, decoder), hidden, targets, rows, trained)
        if kwargs.get("output_router_logits"):
            mask = kwargs.get("attention_mask") if layout is None else None
            return logps, load_balancing_loss(self, outputs.router_logits, mask)
        return logps

    forward.is_fused = True
    model.forward = types.MethodType(forward, model)


def _warn_of_length(longest: int) -> None:
    warnings.warn(
        f"Rows of more than {longest} tokens are padded: this model turns positions by factors that depend on a row's "
        "length, so that its prompt cannot be shared",
        stacklevel=3,
    )


def _decoder_name(model: nn.Module) -> str:
    """Name of the child that makes the hidden states; the head is what the model does with them."""
    name = model.base_model_prefix
    if isinstance(getattr(model, name, None), nn.Module):
        return name
    # Llama 4's text model is not where its prefix says.
    sizes = {name: sum(1 for _ in child.modules()) for name, child in model.named_children()}
    return max(sizes, key=sizes.get)


def _project(model: nn.Module, decoder: str, hidden: Tensor) -> Tensor:
    """Logits, shape (n, V), of hidden states, shape (n, H), by the family's own forward.

    So whatever it does to them is done: dense layers and norms before the projection, scales and caps behind it.
    """
    whole = model._modules[decoder]
    model._modules[decoder] = _HiddenStates(hidden[None], whole)
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return type(model).forward(model, input_ids=ids).logits[0]
    finally:
        model._modules[decoder] = whole


class _HiddenStates(nn.Module):
    """Stands in for a decoder, or for the model around one, whose hidden states are known."""

    def __init__(self, hidden: Tensor, whole: nn.Module):
        super().__init__()
        self.hidden = hidden
        self.__dict__["_whole"] = whole  # not a child of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_whole"], name)  # Falcon-H1's head reads a factor there

    @property
    def decoder(self) -> "_HiddenStates":
        return self

    def forward(self, *args: Any, **kwargs: Any) -> "_Output":
        return _Output(last_hidden_state=self.hidden)


class _Output(BaseModelOutput):
    """A decoder's output. What a family reads of it beside the hidden states (caches, router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.compiler.disable  # its pieces' number differs at every step, and their work is the products'
def target_logps(
    project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, rows: int, trained: bool
) -> Tensor:
    """Log-probs of the targets, `rows` of them at a time; memory is (rows, V), whatever R is.

    Args:
        project: From hidden states, shape (n, H), to logits, shape (n, V).
        hidden: Hidden states that predict the targets. Shape (R, H).
        targets: Token ids. Shape (R,).
        rows: Tokens that are projected together.
        trained: Whether weights of `project` are trained.

    Returns:
        Log-probs in nats, float32 or wider. Shape (R,).
    """
    if trained and torch.is_grad_enabled():

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
