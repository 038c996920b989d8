"""Keys that are set and do nothing in the run at hand, because of another key."""

from collections.abc import Iterator

from alignment.checks.best_model import metric_user
from alignment.configs import Configs
from trl_nca.losses import LOSSES
from trl_nca.losses.targets import gap_targets, hard_labels, quantile_targets, rank_targets

#: Targets that a rescaling of the scores leaves as they are.
_OF_ORDER = (gap_targets, hard_labels, quantile_targets, rank_targets)
_HELD_OUT = "there are no held-out rows"


def keys_without_effect(configs: Configs, pairs: bool, has_held_out: bool) -> list[str]:
    """The keys of the recipe and the command line that do nothing, by reason.

    Args:
        configs: The settings of the run.
        pairs: Whether the rows are preference pairs.
        has_held_out: Whether there are held-out rows.

    Returns:
        Such as "lora_r, lora_alpha (use_peft is false)". A key that is off (false, 0, no, null) is none of them.
    """
    values = {key: getattr(config, key) for config in configs for key in config.__dataclass_fields__}
    of_all = (
        *_of_data(configs), *_of_model(configs), *_of_loss(configs, pairs), *_of_trainer(configs),
        *_of_evaluation(configs, has_held_out),
    )  # fmt: skip
    reasons: dict[str, str] = {}  # by key, the first
    for reason, keys in of_all:
        for key in keys.split():
            if key in configs.run.given and values[key] not in (None, False, 0, "no", "none", [], {}):
                reasons.setdefault(key, reason)
    keys_by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        keys_by_reason.setdefault(reason, []).append(key)
    return [f"{', '.join(keys)} ({reason})" for reason, keys in keys_by_reason.items()]


def _of_data(configs: Configs) -> Iterator[tuple[str, str]]:
    """A reason, and the keys without effect for it."""
    data = configs.data
    if data.num_responses is None:
        yield "num_responses is not set", "choose_responses"
    draws_responses = data.num_responses is not None and data.choose_responses == "random"
    if not draws_responses and data.make_pairs != "best_random":
        yield "nothing is drawn", "draw_seed"


def _of_model(configs: Configs) -> Iterator[tuple[str, str]]:
    policy, args = configs.policy, configs.trainer
    if not policy.use_peft:
        lora = " ".join(key for key in policy.__dataclass_fields__ if key.startswith("lora_"))
        yield "use_peft is false", f"{lora} use_rslora use_dora"
    if args.disable_dropout:
        yield "disable_dropout is true", "lora_dropout"
    if not policy.load_in_4bit:
        yield "load_in_4bit is false", "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage"
    if not args.gradient_checkpointing:
        yield "gradient_checkpointing is false", "gradient_checkpointing_kwargs"
    if not args.torch_compile:
        yield "torch_compile is false", "torch_compile_backend torch_compile_mode"


def _of_loss(configs: Configs, pairs: bool) -> Iterator[tuple[str, str]]:
    args = configs.trainer
    name, loss = args.loss_type, args.loss
    if pairs:
        yield "the target of a pair is its chosen response", "alpha tie_break scale_scores"
    if name in LOSSES and not loss.uses_alpha:  # whether targets of a user's own use it, nobody knows
        yield f"the targets of {name} do not depend on it", "alpha"
    if loss.targets in _OF_ORDER:
        yield f"{name} sees the order of the scores only", "scale_scores"
    if loss.per_token:
        yield f"{name} always takes log-probs a token", "normalize"
    if args.ld_alpha == 1:
        yield "at 1 all tokens count alike", "ld_alpha"
    if not args.has_reference:
        reason = f"{name} has no reference" if loss.reference_free else "reference_free is true"
        yield reason, "precompute_ref_log_probs ref_logps_dir precompute_ref_batch_size sync_ref_model"


def _of_trainer(configs: Configs) -> Iterator[tuple[str, str]]:
    args = configs.trainer
    if args.max_steps > 0:
        yield "max_steps is set", "num_train_epochs"
    if args.lr_scheduler_type == "constant":
        yield "lr_scheduler_type is constant", "warmup_steps"
    if not args.precompute_ref_log_probs:
        yield "precompute_ref_log_probs is false", "ref_logps_dir precompute_ref_batch_size"
    if not args.sync_ref_model:
        yield "sync_ref_model is false", "ref_model_mixup_alpha ref_model_sync_steps"
    if args.logging_strategy != "steps":
        yield f"logging_strategy is {args.logging_strategy.value}", "logging_steps"
    if args.save_strategy != "steps":
        yield f"save_strategy is {args.save_strategy.value}", "save_steps"
    if args.save_strategy == "no":
        yield "save_strategy is no", "save_total_limit save_only_model"
    if not args.push_to_hub:
        yield (
            "push_to_hub is false",
            "hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision hub_token",
        )
    if not args.report_to:
        yield "report_to names no tracker", "run_name project trackio_space_id trackio_bucket_id"


def _of_evaluation(configs: Configs, has_held_out: bool) -> Iterator[tuple[str, str]]:
    run, args = configs.run, configs.trainer
    if not has_held_out:
        yield (
            _HELD_OUT,
            "load_best_model_at_end metric_for_best_model greater_is_better eval_strategy eval_steps eval_delay "
            "eval_on_start eval_prompts_in_training per_device_eval_batch_size do_eval reward_function",
        )
    if args.eval_strategy != "steps":
        yield f"eval_strategy is {args.eval_strategy.value}", "eval_steps"
    if args.eval_strategy == "no":
        yield "eval_strategy is no", "eval_delay eval_on_start eval_prompts_in_training"
    if metric_user(args) is None:
        yield "load_best_model_at_end is false", "metric_for_best_model greater_is_better"
    if not run.reward_function or not has_held_out:
        reason = _HELD_OUT if run.reward_function else "there is no reward_function"
        yield reason, "num_eval_samples max_eval_prompts max_new_tokens temperature samples_before_dir"
