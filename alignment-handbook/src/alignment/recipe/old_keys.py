"""Keys and values of older scripts, and of upstream's and the alignment-handbook's recipes, in today's spelling."""

import logging
from typing import Any

from alignment.errors import UserError

logger = logging.getLogger(__name__)

#: Keys of the 2024 scripts and of alignment-handbook -> today's key, or None for a key that has no effect any more.
OLD_KEYS: dict[str, str | None] = {
    "temperature_alpha": "alpha",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps; see `_ratio_counts`
    "preprocessing_num_workers": "dataset_num_proc",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "tokenizer_name": "tokenizer_name_or_path",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "rpo_alpha": "sft_weight",
    "cpo_alpha": "sft_weight",
    "simpo_gamma": "margin",
    "model_code_revision": None,
    "hub_model_revision": None,
    "base_model_revision": None,
    "logging_dir": None,
    "save_safetensors": None,
    "truncation_side": None,
    "auto_insert_empty_system_msg": None,
    "generate_during_eval": None,
    "is_encoder_decoder": None,
    "force_use_ref_model": None,
    "max_target_length": None,
    "label_pad_token_id": None,
    "padding_value": None,
    "dataset_kwargs": None,
    "use_ipex": None,
    "jit_mode_eval": None,
    "half_precision_backend": None,
    "fp16_opt_level": None,
    "include_tokens_per_second": None,
}

#: Values of older recipes -> today's, by today's key; "" is the default.
OLD_VALUES: dict[str, dict[str, str]] = {
    "loss_type": {"sigmoid": "DPO", "nca_pair": "NCA", "robust": "robustDPO", "bco_pair": "biasedNCA"},
    "attn_implementation": {"true": "flash_attention_2", "false": ""},
    "train_sampling_strategy": {"true": "group_by_length", "false": ""},
}
#: Keys that are numbers today, and could be null under their old names.
_NUMBERS = ("warmup_steps", "sft_weight", "margin")
#: Losses of log-probs a token: TRL's name for DPO of them, and open-instruct's.
_NORMALIZED = ("sigmoid_norm", "dpo_norm")


def translate(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """Translates old keys and values, each with one log line. A key in today's spelling wins over its old one.

    Args:
        recipe: Values by key, from YAML; or lists of the words behind each flag.
        source: The recipe's path or "command line", for messages.

    Raises:
        UserError: warmup_ratio is no share, or there are several losses.
    """
    translated = {key: value for key, value in recipe.items() if key not in OLD_KEYS}
    for old, value in recipe.items():
        if old not in OLD_KEYS or (value is None and OLD_KEYS[old] in _NUMBERS):  # null is off, as in TRL
            continue
        new = OLD_KEYS[old]
        counts = _ratio_counts(recipe, source) if old == "warmup_ratio" else new not in translated
        if new is None or not counts:
            logger.warning("%s: %s is ignored: %s", source, old, f"{new} is given" if new else "it has no effect")
        else:
            logger.warning("%s: %s is now called %s", source, old, new)
            translated[new] = value
    _translate_loss(translated, source)
    for key, values in OLD_VALUES.items():
        value = translated.get(key)
        is_flag = isinstance(value, list)  # of the command line, where a bare one means true
        single = "true" if value == [] else value[0] if is_flag and len(value) == 1 else value
        new = values.get(as_text(single).lower()) if single is not None and not isinstance(single, list) else None
        if new is None:
            continue
        logger.warning("%s: %s: %s is now called %s", source, key, as_text(single), new or "the default")
        if is_flag:
            translated[key] = [new]  # an empty one resets what the recipe says
        elif new:
            translated[key] = new
        else:
            del translated[key]
    return translated


def _translate_loss(recipe: dict[str, Any], source: str) -> None:
    """Names of TRL that mean a loss and a setting here.

    [sigmoid, sft] with loss_weights [1, w] is DPO with sft_weight w, and sigmoid_norm DPO with normalize: tokens.

    Raises:
        UserError: There are several losses, and they are not exactly one with a setting.
    """
    given = recipe.get("loss_type")
    names = [as_text(name).lower() for name in (given if isinstance(given, list) else [given])]
    if len(names) == 2 and names[1] == "sft":
        weights = recipe.get("loss_weights") or [1, 1]  # as TRL's default
        numbers = [_number(weight) for weight in weights] if isinstance(weights, list) else []
        if len(numbers) == 2 and numbers[0] == 1 and numbers[1] is not None:
            recipe.pop("loss_weights", None)
            recipe |= {"loss_type": names[:1], "sft_weight": [as_text(weights[1])]}
            logger.warning("%s: sft beside %s in loss_type is now sft_weight: %s", source, names[0], weights[1])
            names = names[:1]
    if len(names) > 1:
        raise UserError(
            f"{source}: loss_type: a run has one loss, not [{', '.join(names)}]; [sigmoid, sft] with loss_weights "
            "[1, w] is DPO with sft_weight: w"
        )
    if names and names[0] in _NORMALIZED:
        recipe |= {"loss_type": ["DPO"], "normalize": ["tokens"]}
        logger.warning("%s: loss_type: %s is now called DPO with normalize: tokens", source, names[0])


def _ratio_counts(recipe: dict[str, Any], source: str) -> bool:
    """Whether warmup_ratio counts: not beside warmup_steps, but where that is 0, as transformers 4 wrote it.

    Raises:
        UserError: It is no share. (1 and more would be taken for a number of steps.)
    """
    ratio, steps = _number(recipe["warmup_ratio"]), _number(recipe.get("warmup_steps") or 0)
    if ratio is not None and not 0 <= ratio < 1:
        raise UserError(f"{source}: warmup_ratio: a share of all steps, from 0 to below 1; got {ratio:g}")
    return steps == 0


def _number(value: Any) -> float | None:
    """A value of YAML or of the command line as a number; None where it is none."""
    try:
        return float(value[0] if isinstance(value, list) else value)
    except (TypeError, ValueError, IndexError):
        return None


def as_text(value: Any) -> str:
    """A YAML scalar as the word that a user would type."""
    return str(value).lower() if isinstance(value, bool) else str(value)
