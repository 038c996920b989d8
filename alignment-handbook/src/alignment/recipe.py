"""Recipes: a YAML file and `--key=value` overrides, parsed strictly into dataclasses.

A recipe is read as flags, so that its values and those of the command line are converted and checked alike. A key on
the command line replaces the recipe's, and `--key=` (empty) resets it to its default. Keys of older scripts are
translated by one table, `OLD_KEYS`.
"""

import argparse
import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from alignment.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class RunConfig:
    """Settings of the script around the training.

    Attributes:
        given: Keys that the recipe or the command line sets, each with the flags that set it.
    """

    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of one optimizer step, over all processes. gradient_accumulation_steps follows from it, "
            "unless that key is set too."
        },
    )
    show_batch: bool = field(
        default=False, metadata={"help": "Print one tokenized group, decoded, with its mask, and stop."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove an earlier run's files from output_dir, and start anew."}
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": "FILE.py:NAME of a function (prompts, completions, **columns) -> scores. With it, the model is "
            "sampled before and after training on the held-out prompts, and the scores are compared."
        },
    )
    num_eval_samples: int = field(default=4, metadata={"help": "Samples drawn for each held-out prompt."})
    max_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts to sample from, at most."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a sample."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy."})
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print the run's batch, steps and memory, write them to output_dir/plan.json, and "
            "stop. Needs neither weights nor GPU."
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "With plan: number of processes, one a GPU. None: as many as were launched."},
    )
    gpu_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "With plan: memory of a GPU, in GB (1e9 bytes). None: that of the GPU here, of this machine where "
            "the recipe says use_cpu, else 80."
        },
    )
    parallel: str | None = field(
        default=None,
        metadata={
            "help": "With plan: how the run is parallelized. None: as it was launched.",
            "choices": ["ddp", "zero2", "zero3", "fsdp2"],
        },
    )
    num_prompts: int | None = field(
        default=None,
        metadata={"help": "With plan: rows to plan for, where the data is not at hand. None: those of the data."},
    )
    given: dict[str, list[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.plan and self.num_processes is not None:
            raise ValueError(
                f"num_processes: only a plan can ask for {self.num_processes} processes (--plan); to run on as many, "
                f"launch with `accelerate launch --num_processes={self.num_processes}`"
            )
        for key in ("num_processes", "gpu_memory_gb", "num_prompts"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"{key}: must be above 0, got {getattr(self, key)}")


#: Keys of `--plan`, which describe one launch and not the run.
PLAN_KEYS = ("plan", "num_processes", "gpu_memory_gb", "parallel", "num_prompts")


#: Keys of the 2024 scripts and of alignment-handbook -> today's key, or None for a key that has no effect any more.
OLD_KEYS: dict[str, str | None] = {
    "temperature_alpha": "alpha",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
    "preprocessing_num_workers": "dataset_num_proc",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "tokenizer_name": "tokenizer_name_or_path",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
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
    "loss_type": {"sigmoid": "DPO", "nca_pair": "NCA"},
    "attn_implementation": {"true": "flash_attention_2", "false": ""},
    "train_sampling_strategy": {"true": "group_by_length", "false": ""},
}


def parse_recipe(argv: Sequence[str], config_types: Sequence[type]) -> tuple[Any, ...]:
    """Parses `RECIPE.yaml --key=value ...` into one instance of each dataclass.

    Args:
        argv: The command line without the script's name; the recipe comes first (or after `--config`).
        config_types: Dataclasses whose fields are the known keys.

    Returns:
        An instance of each of them, in their order.

    Raises:
        UserError: No recipe, malformed YAML, an unknown key (the nearest known one is named), a value of the wrong
            type or out of range.
    """
    parser = StrictParser(config_types)
    argv = list(argv)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    if "--config" in argv[:1]:
        argv = argv[1:]
    if not argv or argv[0].startswith("-"):
        raise UserError("no recipe given; the first argument is a YAML file, e.g. yamls/reward_cpu.yaml")
    path, overrides = argv[0], argv[1:]

    recipe = _translate(read_yaml(path), path)
    known = sorted({action.dest for action in parser._actions})
    for key in recipe:
        _check_known(key, known, path)
    defaults = {key: parser.get_default(key) for key in known}
    recipe_flags = {key: _as_flags(key, value) for key, value in recipe.items() if value is not None}
    parser.set_defaults(**{key: None for key, value in recipe.items() if value is None})
    parser.source = path
    parser.parse_args(_flatten(recipe_flags))  # alone first, so that an error names its source

    overrides = _flags_to_dict(overrides)
    for key in overrides:
        _check_known(
            key, [*known, *OLD_KEYS, *(option[2:] for option in parser._option_string_actions)], "command line"
        )
    flags = {key: _with_values(key, values) for key, values in _translate(overrides, "command line").items()}
    for key in [key for key, flag in flags.items() if flag in ([f"--{key}="], [f"--{key}=null"])]:
        is_null = flags.pop(key) == [f"--{key}=null"]
        recipe_flags.pop(key, None)
        parser.set_defaults(**{key: None if is_null else defaults.get(key)})
    parser.source = "command line"
    try:
        configs = parser.parse_args_into_dataclasses(args=_flatten(recipe_flags | flags), look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{path}: {error}") from error
    for config in configs:
        if isinstance(config, RunConfig):
            config.given = recipe_flags | flags
    return configs


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        UserError: No such file, not YAML (with the line), or not a mapping.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise UserError(f"{path}: a recipe is a mapping of 'key: value' lines, and this is none")
    return recipe


class StrictParser(TrlParser):
    """Upstream's parser, without abbreviated flags, and with errors for the user."""

    source = "command line"

    def __init__(self, config_types: Sequence[type]):
        super().__init__(config_types, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source}: {message}")


def _check_known(key: str, known: Sequence[str], source: str) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "see --help for all keys"
        raise UserError(f"{source}: unknown key {key!r}; {hint}")


def _translate(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """Translates old keys and values, each with one log line. A key in today's spelling wins over its old one."""
    translated = {key: value for key, value in recipe.items() if key not in OLD_KEYS}
    for old, value in recipe.items():
        if old not in OLD_KEYS:
            continue
        new = OLD_KEYS[old]
        if new is None or new in translated:
            logger.warning("%s: %s is ignored: %s", source, old, f"{new} is given" if new else "it has no effect")
        else:
            logger.warning("%s: %s is now called %s", source, old, new)
            translated[new] = value
    for key, values in OLD_VALUES.items():
        value = translated.get(key)
        is_flag = isinstance(value, list)  # of the command line, where a bare one means true
        single = "true" if value == [] else value[0] if is_flag and len(value) == 1 else value
        new = values.get(_scalar(single).lower()) if single is not None and not isinstance(single, list) else None
        if new is None:
            continue
        logger.warning("%s: %s: %s is now called %s", source, key, _scalar(single), new or "the default")
        if is_flag:
            translated[key] = [new]  # an empty one resets what the recipe says
        elif new:
            translated[key] = new
        else:
            del translated[key]
    return translated


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_flags(key: str, value: Any) -> list[str]:
    """A YAML value as the flag that a user would type."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(_scalar, value)]
    return [f"--{key}={_scalar(value)}"]


def _flags_to_dict(flags: Sequence[str]) -> dict[str, list[str]]:
    """`--a=1 --b 2 3 --c` to {"a": ["1"], "b": ["2", "3"], "c": []}."""
    given: dict[str, list[str]] = {}
    key = None
    for flag in flags:
        if flag.startswith("--"):
            key, equals, value = flag[2:].partition("=")
            given[key] = [value] if equals else []
        elif key is None:
            raise UserError(f"command line: {flag!r} belongs to no --key; write --key=value")
        else:
            given[key].append(flag)
    return given


def _flatten(flags: dict[str, list[str]]) -> list[str]:
    return [word for words in flags.values() for word in words]


def _with_values(key: str, values: list[str]) -> list[str]:
    return [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *values]
