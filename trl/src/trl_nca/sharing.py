"""Which models can run packed groups, and switching them to it and back."""

from collections.abc import Sequence

from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from trl_nca.flash import use_newer_flash
from trl_nca.shared_prompt import NAME, CannotShare

#: Configs and the attention that they had before.
Attention = list[tuple[PretrainedConfig, str]]


def share_prompts(models: Sequence[nn.Module]) -> Attention:
    """Makes models run packed groups. Sampling, and batches without a layout, run as before.

    Args:
        models: Policy and, where it is a model of its own, reference; plain or wrapped by PEFT.

    Returns:
        What `unshare_prompts` undoes it with.

    Raises:
        CannotShare: A model cannot; says why. None was changed.
    """
    for model in models:
        if reason := unsupported_reason(model):
            raise CannotShare(reason)
    use_newer_flash([base_model(model) for model in models])
    # Not the model's config alone: layers that PEFT replicates have copies of it.
    configs = [getattr(module, "config", None) for model in models for module in model.modules()]
    before = {id(c): (c, c._attn_implementation) for c in configs if isinstance(c, PretrainedConfig)}
    for config, _ in before.values():
        config._attn_implementation = NAME
    return list(before.values())


def unshare_prompts(before: Attention) -> None:
    """Gives models back the attention that they had."""
    for config, name in before:
        config._attn_implementation = name


def unsupported_reason(model: nn.Module) -> str | None:
    """Why this model cannot run packed groups, as far as it can be seen without running it; None when nothing is."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before the prompt"
    model = base_model(model)
    config = model.config.get_text_config()
    if config._attn_implementation == "eager":
        return "its attention is 'eager', which scores by rules of its own"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    return None


def base_model(model: nn.Module) -> nn.Module:
    """The model without its adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
