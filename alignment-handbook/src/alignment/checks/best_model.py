"""The metric by which the best checkpoint is told: whether an evaluation will give it."""

import torch
from datasets import Dataset
from transformers import PretrainedConfig

from alignment.data.reading import column
from alignment.errors import UserError, did_you_mean
from trl_nca.config import NCAConfig
from trl_nca.metrics import group_metrics
from trl_nca.token_metrics import TokenMetrics

#: What the Trainer itself measures.
_OF_TRAINER = ("runtime", "samples_per_second", "steps_per_second")


def check_best_model(args: NCAConfig, held_out: Dataset | None, config: PretrainedConfig) -> None:
    """Ends a run that would look for its best checkpoint by a metric that is not there, after the first evaluation.

    Args:
        args: The training arguments.
        held_out: Tokenized held-out rows; None without any.
        config: The model's config.

    Raises:
        UserError: No evaluation gives `metric_for_best_model`; names the nearest that one gives.
    """
    needing = metric_user(args)
    if needing is None:
        return
    if held_out is None:
        if needing == "load_best_model_at_end":
            return  # without effect, which `no_effect` says
        raise UserError(f"{needing}: needs an evaluation, and there are no held-out rows; set eval_file, or change it")
    known = evaluation_metrics(held_out, config)
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in known:
        hint = f"{did_you_mean(metric, known)} There are {', '.join(known)}".strip()
        raise UserError(f"metric_for_best_model: no evaluation gives {args.metric_for_best_model!r}; {hint}")


def metric_user(args: NCAConfig) -> str | None:
    """The setting that looks at `metric_for_best_model`; None where none does."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end"
    if args.save_strategy == "best":
        return "save_strategy: best"
    is_plateau = args.lr_scheduler_type == "reduce_lr_on_plateau"
    return "lr_scheduler_type: reduce_lr_on_plateau" if is_plateau else None


def evaluation_metrics(held_out: Dataset, config: PretrainedConfig) -> list[str]:
    """Names of what an evaluation on these rows gives, without the prefix `eval_`."""
    num_responses = max(map(len, column(held_out, "scores").to_pylist()))
    ones = torch.ones(1, num_responses)
    names = [*TokenMetrics.NAMES, *group_metrics(ones[:, 0], ones, ones, ones, ones.bool())]
    if hasattr(config.get_text_config(), "output_router_logits"):
        names.append("aux_loss")
    return [*names, *_OF_TRAINER]
