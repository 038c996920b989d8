"""The check of a model's log-probs, where a plan is made and the weights are at hand."""

import warnings
from pathlib import Path

import psutil
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from alignment.errors import UserError
from alignment.models import PolicyConfig, model_init_kwargs
from trl_nca.config import NCAConfig
from trl_nca.logps import prepare

#: Share of the free memory that the weights may take.
_SHARE = 0.5


def check_model(policy: PolicyConfig, args: NCAConfig) -> str | None:
    """Loads the policy on the CPU, not quantized, and checks its log-probs as a run does before its first step.

    Returns:
        A line on the outcome, or on why there is none; None where the recipe wants none.

    Raises:
        UserError: The model cannot be trained; says why.
    """
    if not args.check_logps:
        return None
    size = sum(file.stat().st_size for file in Path(policy.model_name_or_path).glob("*.safetensors"))
    if not size:
        return "Log-probs are checked when the run starts: the weights are not in a folder here"
    if size > psutil.virtual_memory().available * _SHARE:
        return "Log-probs are checked when the run starts: the weights are too large for this machine"
    try:
        kwargs = model_init_kwargs(policy) | {"trust_remote_code": args.trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(policy.model_name_or_path, **kwargs)
        if policy.use_peft:
            model = get_peft_model(model, get_peft_config(policy))
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng():
            warnings.simplefilter("always")
            shares = prepare([model], args.shared_prompt)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{policy.model_name_or_path}: cannot be trained with these settings: {error}") from error
    found = [str(w.message) for w in caught if "rows are padded" in str(w.message)]
    return (
        "Log-probs: those of the model's own forward, packed"
        if shares
        else "; ".join(found) or ("Log-probs: those of the model's own forward, in padded rows")
    )
