"""The reference of a policy with an adapter: the model that training starts from.

Most adapters change nothing at first, and leave the base as it is: the reference is the model with the adapter off.
PiSSA, OLoRA and their like take a part out of the base's weights at their start, virtual tokens are random at theirs,
and `bias: all` or `lora_only` trains the base's own biases: there it is the model with a copy of its first weights.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from peft import PeftModel, PeftType
from trl.trainer.utils import use_adapter

#: `init_lora_weights` of adapters that change nothing at first.
_NEUTRAL = (True, None, "gaussian", "eva")


class AdapterReference:
    """The reference of a policy, before its first step.

    Args:
        policy: A model with an adapter that is trained. With a copy of it under the name "ref", which TRL makes of an
            adapter that was trained before, that is the reference.
        keeps_copy: Whether a copy of the first weights can be kept.

    Attributes:
        switched_off: Name of the adapter that does not count for the reference; None where the first weights do.

    Raises:
        ValueError: A copy is needed, and cannot be kept.
    """

    def __init__(self, policy: PeftModel, keeps_copy: bool = True):
        self._policy = policy
        reason = None if "ref" in policy.peft_config else differs_from_base(policy)
        if reason and not keeps_copy:
            raise ValueError(
                f"the reference is the model that training starts from, and {reason}: no copy of sharded weights is "
                "kept; set precompute_ref_log_probs: true"
            )
        trained = [p for p in policy.parameters() if p.requires_grad] if reason else []
        self._start = [(p, p.detach().clone()) for p in trained]
        self.switched_off = None if reason else policy.active_adapter

    def weights(self) -> AbstractContextManager[None]:
        """A context in which the policy has the reference's weights."""
        if self.switched_off is None:
            return self._restored()
        return use_adapter(self._policy, adapter_name="ref" if "ref" in self._policy.peft_config else None)

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


def differs_from_base(model: PeftModel) -> str | None:
    """Why the model with its adapter off is not, or will not stay, the one that training starts from; None if it is."""
    config = model.active_peft_config
    if config.is_prompt_learning:
        return "virtual tokens are random at first"
    for key in ("init_lora_weights", "init_weights"):
        init = getattr(config, key, True)
        if init not in _NEUTRAL:
            return f"{key}: {init} changes the model at first"
    if config.peft_type == PeftType.ADAPTION_PROMPT:
        return None
    if any(p.requires_grad and model.active_adapter not in name.split(".") for name, p in model.named_parameters()):
        return f"weights of the base are trained too (bias: {getattr(config, 'bias', 'none')})"
    return None
