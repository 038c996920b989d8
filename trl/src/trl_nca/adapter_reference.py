"""The reference of a policy with an adapter: the model that training starts from.

Most adapters change nothing at first, and leave the base as it is: the reference is the model with the adapter off.
PiSSA, OLoRA and their like take a part out of the base's weights at their start, virtual tokens are random at theirs,
and `bias: all` or `lora_only` trains the base's own biases: there it is the model with a copy of its first weights.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from trl.trainer.utils import use_adapter

from trl_nca.self_check import evaluating, probe_logits

#: `init_lora_weights` of adapters that change nothing at first.
_NEUTRAL = (True, None, "gaussian", "eva")


class AdapterReference:
    """The reference of a policy, before its first step.

    Args:
        policy: A model with an adapter that is trained. With a copy of it under the name "ref", which TRL makes of an
            adapter that was trained before, that is the reference.
        sharded: Whether the weights are spread over processes: then the policy is not run, and no copy is kept.
        precomputed: Whether the reference is run before the first step alone.

    Attributes:
        switched_off: Name of the adapter that does not count for the reference; None where the first weights do.

    Raises:
        ValueError: A copy is needed, and is not kept.
    """

    def __init__(self, policy: PeftModel, sharded: bool = False, precomputed: bool = False):
        self._policy, self._switch = policy, AdapterSwitch(policy)
        reason = None if "ref" in policy.peft_config else _moves_base(policy) or self._changes_base(sharded)
        if reason and sharded and not precomputed:
            raise ValueError(
                f"the reference is the model that training starts from, and {reason}: no copy of sharded weights is "
                "kept; set precompute_ref_log_probs: true"
            )
        trained = [p for p in policy.parameters() if p.requires_grad] if reason and not sharded else []
        self._start = [(p, p.detach().clone()) for p in trained]
        self.switched_off = None if reason else policy.active_adapter

    def weights(self) -> AbstractContextManager[None]:
        """A context in which the policy has the reference's weights."""
        if self.switched_off is None:
            return self._restored()
        return self._switch.off()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        today = [p.data for p, _ in self._start]
        try:
            for p, start in self._start:
                p.data = start.to(p.device, p.dtype)
            yield
        finally:
            for (p, _), data in zip(self._start, today, strict=True):
                p.data = data

    def _changes_base(self, sharded: bool) -> str | None:
        """Why the model with its adapter off is another one than training starts from."""
        config = self._policy.active_peft_config
        if config.is_prompt_learning:
            return "virtual tokens are random at first"
        if sharded:
            init = getattr(config, "init_lora_weights", getattr(config, "init_weights", True))
            return None if init in _NEUTRAL else f"init_lora_weights: {init} changes the model at first"
        with torch.no_grad(), evaluating(self._policy):
            logits = []
            for weights in (nullcontext(), self._switch.off()):
                with weights:
                    logits.append(probe_logits(self._policy))
        return None if torch.allclose(*logits, rtol=1e-5, atol=1e-4) else "the adapter changes the model at first"


def _moves_base(policy: PeftModel) -> str | None:
    """Why the model with its adapter off does not stay as it is."""
    config = policy.active_peft_config
    if config.is_prompt_learning or config.peft_type == PeftType.ADAPTION_PROMPT:
        return None
    if any(p.requires_grad and policy.active_adapter not in name.split(".") for name, p in policy.named_parameters()):
        return f"weights of the base are trained too (bias: {getattr(config, 'bias', 'none')})"
    return None


class AdapterSwitch:
    """Switches a policy to its reference's adapter, "ref" where there is one, else to none, and back.

    PEFT's own context looks through all modules and prints their names first, which takes longer than a GPU takes for
    the reference of a few thousand tokens. Weights keep `requires_grad`: the reference is run without gradient.
    """

    def __init__(self, policy: PeftModel):
        self._policy, self._adapter = policy, "ref" if "ref" in policy.peft_config else None
        kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
        self._layers = [module for module in policy.modules() if isinstance(module, kinds)]

    def off(self) -> AbstractContextManager[None]:
        """A context in which the model is the reference's."""
        if self._policy.peft_type != PeftType.LORA:
            return use_adapter(self._policy, self._adapter)
        if self._adapter:
            return self._changed("_active_adapter", [self._adapter])
        return self._changed("_disable_adapters", True)

    @contextmanager
    def _changed(self, attribute: str, value: object) -> Iterator[None]:
        before = [getattr(layer, attribute) for layer in self._layers]
        try:
            for layer in self._layers:
                setattr(layer, attribute, value)
            yield
        finally:
            for layer, old in zip(self._layers, before, strict=True):
                setattr(layer, attribute, old)
