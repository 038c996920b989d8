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
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from trl_nca.cross_entropy import CrossEntropy, fused_cross_entropy
from trl_nca.layout import padded_inputs
from trl_nca.rotary import length_dependent, longest_shared, rotating_by_row
from trl_nca.router import load_balancing_loss


def tokens_at_once(device: str, vocabulary: int) -> int:
    """How many tokens to project together on a kind of device.

    On a GPU more than about 400, whatever V is: fewer are multiplied in less time than an H100 takes to read the
    weight. On a CPU 64 MiB of float32 logits: larger gains nothing, smaller loses matrix-product speed.
    """
    return max(1, 2**24 // vocabulary) if device == "cpu" else 512


def fuse_head(model: nn.Module) -> None:
    """Patches a causal language model so that `model(..., positions=, targets=)` returns log-probs in place of logits.

    `targets`, shape (R,), are token ids, and `positions`, shape (R,), the places in the flattened rows, of `row_length`
    tokens (default: of those that run), that predict them; the result is their log-probs, shape (R,). Only these
    positions are projected, in the way of `run_device`, "cuda" or "cpu" (default: of the device that they are on).
    The log-probs are those of softmax(logits / `temperature`).
    Without `targets` the model runs as before. Returned too, in this order: with `token_statistics` those of
    `cross_entropy`, shape (R, 2), and with `output_router_logits` a mixture of experts' load-balancing loss. To be
    called on the bare model; wrapped by PEFT, DDP, FSDP or DeepSpeed it takes the arguments all the same.
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
        run_device: str | None = None,
        token_statistics: bool = False,
        temperature: float = 1.0,
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
        device = run_device or hidden.device.type
        at_once = tokens_at_once(device, self.config.get_text_config().vocab_size)
        project = functools.partial(_project, self, decoder, temperature)
        logps, statistics = target_logps(project, hidden, targets, at_once, trained, token_statistics)
        returned = (logps, statistics) if token_statistics else (logps,)
        if kwargs.get("output_router_logits"):
            mask = kwargs.get("attention_mask") if layout is None else None
            returned += (load_balancing_loss(self, outputs.router_logits, mask),)
        return returned if len(returned) > 1 else logps

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


def _project(model: nn.Module, decoder: str, temperature: float, hidden: Tensor) -> Tensor:
    """Logits over the temperature, shape (n, V), of hidden states, shape (n, H), by the family's own forward.

    So whatever it does to them is done: dense layers and norms before the projection, scales and caps behind it.
    """
    whole = model._modules[decoder]
    model._modules[decoder] = _HiddenStates(hidden[None], whole)
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits = type(model).forward(model, input_ids=ids).logits.squeeze(0)  # an index would copy its gradient
    finally:
        model._modules[decoder] = whole
    if temperature == 1:
        return logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # as `generate` divides


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
    project: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    at_once: int,
    trained: bool,
    needs_statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets, `at_once` of them at a time; memory is (at_once, V), whatever R is.

    Args:
        project: From hidden states, shape (n, H), to logits, shape (n, V).
        hidden: Hidden states that predict the targets. Shape (R, H).
        targets: Token ids. Shape (R,).
        at_once: Tokens that are projected together.
        trained: Whether weights of `project` are trained.
        needs_statistics: Whether statistics are made.

    Returns:
        Log-probs in nats, float32 or wider, shape (R,); and the statistics of `cross_entropy`, without gradient, shape
        (R, 2), or nothing.
    """
    if trained and torch.is_grad_enabled():

        def piece(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return CrossEntropy.apply(project(h), t, needs_statistics)

        pieces = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        # Hidden states alone are kept; logits are made again for the gradient.
        results = [checkpoint(piece, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in pieces]
        losses, statistics = zip(*results, strict=True)
        return -torch.cat(losses), torch.cat(statistics)
    return _FrozenHead.apply(hidden, targets, project, at_once, needs_statistics)


class _FrozenHead(torch.autograd.Function):
    """Log-probs whose gradient is made on the way forward, so that the logits are made once; and statistics.

    Where the head is not trained, all that a loss sends back to a token is one number g, the derivative by its
    log-prob, and the gradient of its hidden state is g times a vector that is known in advance. Those vectors, shape
    (R, H), are kept; neither logits nor a second projection is needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        project: Callable[[Tensor], Tensor],
        at_once: int,
        needs_statistics: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        gradients = torch.empty_like(hidden) if needs_gradient else None  # of the cross-entropy, -log p
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        statistics = [hidden.new_zeros(0, 2, dtype=torch.float32)]
        for at in range(0, len(targets), at_once):
            part = slice(at, at + at_once)
            part_losses, by_hidden, part_statistics = _piece(
                project, hidden[part], targets[part], needs_gradient, needs_statistics
            )
            losses.append(part_losses)
            statistics.append(part_statistics)
            if needs_gradient:
                gradients[part] = by_hidden
        if needs_gradient:
            ctx.save_for_backward(gradients)
        all_statistics = torch.cat(statistics)
        ctx.mark_non_differentiable(all_statistics)
        return -torch.cat(losses), all_statistics

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (-gradient[:, None] * gradients).to(gradients.dtype), None, None, None, None


def _piece(
    project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, needs_gradient: bool, needs_statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Cross-entropies, shape (n,), their gradients by the hidden states, shape (n, H), and statistics, shape (n, 2).

    Its logits end with it.
    """
    with torch.set_grad_enabled(needs_gradient):
        h = hidden.detach().requires_grad_(needs_gradient)
        logits = project(h.view_as(h))  # (n, V); a view, for hooks on the head that do not take a leaf
    losses, by_logits, statistics = fused_cross_entropy(logits.detach(), targets, needs_gradient, needs_statistics)
    by_hidden = torch.autograd.grad(logits, h, by_logits)[0] if needs_gradient else None
    return losses, by_hidden, statistics
