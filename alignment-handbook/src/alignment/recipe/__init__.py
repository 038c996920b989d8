"""Recipes: a YAML file and `--key=value` overrides, parsed strictly into dataclasses.

A key meets the files in this order: `yaml_file` reads the recipe, `old_keys` translates keys and values of older and of
upstream's recipes, `flags` splits the command line and finds misspelt keys (with `help` by their descriptions in
`keys.json`), `paths` expands what stands for a folder, `settings` has the keys of the script itself, and `parse` makes
flags and dataclasses of them all. `chat_template` has the values of two keys, which change a tokenizer. Only these two
import trl or transformers, which takes seconds; they are imported by their own names.
"""

from alignment.recipe.old_keys import OLD_KEYS, OLD_VALUES
from alignment.recipe.settings import PLAN_KEYS, RunConfig
from alignment.recipe.yaml_file import read_yaml

__all__ = ["OLD_KEYS", "OLD_VALUES", "PLAN_KEYS", "RunConfig", "read_yaml"]
