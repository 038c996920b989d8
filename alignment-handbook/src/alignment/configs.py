"""The settings of a run, by whom they are for."""

from collections.abc import Sequence
from typing import NamedTuple

from alignment.data.load import DataConfig
from alignment.errors import UserError
from alignment.models import PolicyConfig
from alignment.recipe import RunConfig
from alignment.recipe.old_keys import as_text
from alignment.recipe.parse import parse_recipe
from trl_nca.config import NCAConfig
from trl_nca.loss_config import LossConfig


class Configs(NamedTuple):
    """The settings of a recipe and the command line.

    Attributes:
        data: Sources of the rows, and how they are read.
        policy: The model, its adapter, its quantization, its tokenizer.
        run: Settings of the script around the training.
        trainer: Training arguments: loss, lengths, optimizer, saving.
    """

    data: DataConfig
    policy: PolicyConfig
    run: RunConfig
    trainer: NCAConfig


def parse_configs(argv: Sequence[str]) -> Configs:
    """Parses `RECIPE.yaml --key=value ...`; see `recipe.parse.parse_recipe` for arguments and errors.

    Raises:
        UserError: There is no folder to write to: upstream would take one of its own.
    """
    configs = Configs(*parse_recipe(argv, list(Configs.__annotations__.values())))
    if "output_dir" not in configs.run.given or not configs.trainer.output_dir.strip():
        raise UserError("output_dir: is empty or not given; name a folder, as --output_dir=runs/mine")
    return configs


def describe_loss(configs: Configs, pairs: bool) -> str:
    """The loss and its settings in a line, for the start of every run; says what is a default.

    Args:
        configs: From `parse_configs`.
        pairs: Whether the rows are preference pairs, whose targets need no alpha.

    Raises:
        UserError: Pairs, and no loss_type: a recipe for TRL or the alignment-handbook means their default by that,
            which is DPO, and the one here is NCA.
    """
    args, given = configs.trainer, configs.run.given
    if pairs and "loss_type" not in given:
        raise UserError(
            "loss_type: is not given, and a recipe for TRL or the alignment-handbook means DPO by that; set "
            "--loss_type=DPO, or --loss_type=NCA"
        )

    def setting(key: str, text: str, note: str) -> str:
        return text if key in given else f"{text} ({note})"

    of_default_beta = "the default; TRL's is 0.1"
    if args.per_token:  # a sum is as many times as large as it has tokens
        of_default_beta = "the default, for sums; here implicit rewards are of a token, for which Tulu 3's DPO takes 5"
    settings = [
        setting("loss_type", args.loss_type, "the default: loss_type is not given"),
        setting("beta", f"beta {args.beta:g}", of_default_beta),
    ]
    if not pairs:
        settings += [setting("alpha", f"alpha {args.alpha:g}", "the default")] if args.loss.uses_alpha else []
        settings += [f"tie_break {args.tie_break:g}"] if args.tie_break else []
    for key in ("label_smoothing", "margin", "normalize", "ld_alpha", "sft_weight", "reference_free"):
        value = getattr(args, key)
        if value != LossConfig.__dataclass_fields__[key].default:
            settings.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {as_text(value)}")
    return f"Loss: {', '.join(settings)}"
