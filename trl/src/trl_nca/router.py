r"""The load-balancing loss of mixture-of-experts models, beside the loss of the responses.

Legend: B prompts, K responses, T tokens of a forward, E experts.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from trl_nca.sharing import base_model


def load_balancing_loss(model: nn.Module, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    r"""The auxiliary loss of a forward, by the model's own function.

    .. math:: E \sum_e f_e p_e

    with f_e the share of the tokens that expert e gets and p_e its mean probability, over all layers and real tokens.

    Args:
        model: A causal language model that `check_router` lets pass.
        router_logits: The router's logits of each layer. Shape (T, E) each.
        attention_mask: True for real tokens, shape (rows, length); any other shape means that all T are real.

    Returns:
        A scalar; num_experts_per_tok (Mixtral: 2) where the load is even.
    """
    function = _loss_function(model)
    mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    return function(router_logits, model.num_experts, model.num_experts_per_tok, mask)


def check_router(model: nn.Module, enabled: bool) -> None:
    """Checks that a model, bare or wrapped by PEFT, has the load-balancing loss that it is to be trained on.

    Raises:
        ValueError: It cannot; says what to set.
    """
    if not enabled:
        return
    model = base_model(model)
    function = _loss_function(model)
    known = function is not None and list(inspect.signature(function).parameters)[1:] == [
        "num_experts", "top_k", "attention_mask",
    ]  # fmt: skip
    if not known or not hasattr(model, "num_experts_per_tok"):
        raise ValueError(
            f"router_aux_loss_coef: {type(model).__name__} does not say how the load of its experts is measured; "
            "set it to 0 to train without"
        )


def _loss_function(model: nn.Module) -> Any:
    """transformers gives each family a copy of the function, beside the model's class, from which FSDP2 derives one."""
    modules = [sys.modules[family.__module__] for family in type(model).__mro__]
    return next((m.load_balancing_loss_func for m in modules if hasattr(m, "load_balancing_loss_func")), None)


class RouterLoss:
    r"""The load-balancing losses of a micro-batch's forwards, as one term of each prompt's loss.

    .. math:: c \sum_f \frac{K_{bf}}{K_b} \, aux_f

    where forward f runs K_bf of prompt b's K_b responses; of a response that is run in pieces each counts by its share
    of the tokens. Averaged over the prompts of the global batch as their losses
    are, that is c times the mean over the step's forwards, weighted by their prompts: with one forward a micro-batch,
    one process and no accumulation, c times upstream's `aux_loss`.

    Args:
        batch: The micro-batch.
        coefficient: c; None for a model without experts, or a coefficient of 0: then there is no term.
    """

    def __init__(self, batch: dict[str, Any], coefficient: float | None):
        self.coefficient = coefficient
        self.num_responses = batch["response_mask"].sum(dim=1)  # (B,)
        self._training = torch.is_grad_enabled()
        self._values = torch.zeros_like(self.num_responses, dtype=torch.float32)
        self._terms: list[Tensor] = []  # of forwards that are not back-propagated yet. Shape (B,) each

    @property
    def enabled(self) -> bool:
        return self.coefficient is not None

    def add(self, chunk: dict[str, Any], loss: Tensor) -> None:
        """Notes the scalar loss of a forward. One without gradient, before that with it, does not count."""
        if torch.is_grad_enabled() != self._training:
            return
        term = chunk["response_mask"].sum(dim=1) / self.num_responses * chunk.get("share", 1.0) * loss.float()  # (B,)
        self._values += term.detach()
        self._terms.append(term)

    def pop_gradient_term(self) -> Tensor | float:
        """A term of value 0 for each prompt, with the gradient of the forwards since the last call. Shape (B,).

        The value is left out so that the loss that is logged is that of the responses alone.
        """
        terms, self._terms = self._terms, []
        return sum(self.coefficient * (term - term.detach()) for term in terms)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """`aux_loss` of each prompt, before the coefficient. Shape (B,)."""
        return {"aux_loss": self._values} if self.enabled else {}
