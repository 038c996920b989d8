"""Expands `~` and `$VARIABLE` in the keys that name files and folders, which no shell has seen in a recipe."""

import json
import os
import re
from typing import Any

from alignment.errors import UserError

#: Keys whose value, or whose mapping's keys and texts, are paths.
PATH_KEYS = (
    "output_dir train_file eval_file dataset_mixer dataset_mixture model_name_or_path tokenizer_name_or_path "
    "ref_logps_dir samples_before_dir chat_template resume_from_checkpoint reward_function loss_type deepspeed "
    "fsdp_config accelerator_config"
).split()

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expand_paths(value: Any, source: str) -> Any:
    """A value with the home folder and environment variables in place of `~` and `$NAME`, at any depth.

    Args:
        value: Of a key in `PATH_KEYS`: a text, a list, a mapping, or a mapping as JSON.
        source: The recipe's path and the key, or the flag, for errors.

    Raises:
        UserError: A variable is not set.

    Example:
        >>> os.environ["RUNS"] = "/scratch/runs"
        >>> expand_paths({"$RUNS/rows.jsonl": 0.5}, "recipe.yaml: dataset_mixer")
        {'/scratch/runs/rows.jsonl': 0.5}
    """
    if isinstance(value, dict):
        return {expand_paths(key, source): expand_paths(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_paths(item, source) for item in value]
    if not isinstance(value, str) or "\n" in value or "{{" in value or "{%" in value:  # a chat template is no path
        return value
    if value.startswith("{") and (mapping := _from_json(value)) is not None:
        return json.dumps(expand_paths(mapping, source))
    return os.path.expanduser(_VARIABLE.sub(lambda match: _variable(match, value, source), value))


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _variable(match: re.Match[str], value: str, source: str) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise UserError(f"{source}: {value}: the variable {name} is not set; set it, or write the path out")
    return os.environ[name]
