"""The settings of a run, by whom they are for."""

from collections.abc import Sequence
from typing import NamedTuple

from alignment.data.load import DataConfig
from alignment.models import PolicyConfig
from alignment.recipe import RunConfig, parse_recipe
from trl_nca.config import NCAConfig


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
    """Parses `RECIPE.yaml --key=value ...`; see `recipe.parse_recipe` for arguments and errors."""
    return Configs(*parse_recipe(argv, list(Configs.__annotations__.values())))
