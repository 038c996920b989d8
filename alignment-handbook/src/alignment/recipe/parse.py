"""Recipes: a YAML file and `--key=value` overrides, parsed strictly into dataclasses.

A recipe is read as flags, so that its values and those of the command line are converted and checked alike. A key on
the command line replaces the recipe's, and `--key=` (empty) resets it to its default.
"""

import argparse
import json
import logging
import re
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from alignment.errors import UserError, check_flags, with_nearest
from alignment.recipe.flags import check_known, split_command_line
from alignment.recipe.old_keys import OLD_KEYS, as_text, translate
from alignment.recipe.paths import PATH_KEYS, expand_paths
from alignment.recipe.settings import RunConfig
from alignment.recipe.yaml_file import read_yaml

logger = logging.getLogger(__name__)

#: Levels of transformers' logger at which it prints the model's config at each checkpoint, and more of the kind.
_CHATTY = ("detail", "debug", "info")


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
    path, given = split_command_line(argv)
    defaults = {key: parser.get_default(key) for key in parser.keys}

    recipe_flags = _flags_of_recipe(parser, path)
    flags = parser.flags = _flags_of_command_line(parser, given)
    for key in [key for key, flag in flags.items() if flag in ([f"--{key}="], [f"--{key}=null"])]:
        is_null = flags.pop(key) == [f"--{key}=null"]
        recipe_flags.pop(key, None)
        if is_null:
            parser.set_null(key, f"--{key}=null")
        else:
            parser.set_defaults(**{key: defaults.get(key)})
    try:
        configs = parser.parse_args_into_dataclasses(args=_flatten(recipe_flags | flags), look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        parser.error(str(error))
    for config in configs:
        if isinstance(config, RunConfig):
            config.given = recipe_flags | flags
    return configs


class StrictParser(TrlParser):
    """Upstream's parser, without abbreviated flags, with lists where a text or a list may stand, and errors for users.

    Attributes:
        recipe: Path of the recipe, for errors; None for a script without.
        flags: The flags of the command line by key, as they were given, for errors.
    """

    recipe: str | None = None
    flags: Mapping[str, list[str]] = MappingProxyType({})

    def __init__(self, config_types: Sequence[type]):
        super().__init__(config_types, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self._types = {key: hint for config in config_types for key, hint in typing.get_type_hints(config).items()}
        self._one_or_more = [key for key, hint in self._types.items() if {str, list[str]} <= {*typing.get_args(hint)}]
        for action in self._actions:
            if action.dest in self._one_or_more:
                action.nargs = "*"
            if action.nargs == "?" and self._types.get(action.dest) == bool | str:
                action.type = _bool_or_auto

    @property
    def keys(self) -> list[str]:
        """All keys that a recipe can set."""
        return sorted({action.dest for action in self._actions})

    def action(self, key: str) -> argparse.Action:
        """What is known of a key: its choices, and how many values it takes."""
        return next(action for action in self._actions if action.dest == key)

    def set_null(self, key: str, place: str) -> None:
        """Makes None the default of a key, which null in a recipe means.

        Args:
            key: The key.
            place: The recipe and the key, or the flag, for errors.

        Raises:
            UserError: The key is a number, which cannot be None.
        """
        if self._types.get(key) in (int, float):
            raise UserError(f"{place}: null is no number; leave the key out for {self.get_default(key)}")
        self.set_defaults(**{key: None})

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        if self.recipe is None:
            check_flags(sys.argv[1:], self._option_string_actions)
        namespace, rest = super().parse_known_args(*args, **kwargs)
        for key in self._one_or_more:
            value = getattr(namespace, key, None)
            if isinstance(value, list) and len(value) == 1:
                setattr(namespace, key, value[0])
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Ends the run; names the flag that was given, else the recipe, and the nearest of the values that there are.

        Args:
            message: Of argparse ("argument --beta: ..."), or of a dataclass ("beta: ...").
        """
        message = re.sub(r"^argument --([\w-]+)\S*: ", r"\1: ", message)
        message = with_nearest(message) or message
        start, _, rest = message.partition(": ")
        # Elsewhere in a message a word such as `score` need not mean the key.
        within = [key for key in self.flags if "_" in key and re.search(rf"\b{key}\b", message)]
        if start in self.flags:
            raise UserError(f"{self._as_given(start)}: {rest}")
        raise UserError(f"{self._as_given(within[0]) if within else self.recipe or 'command line'}: {message}")

    def _as_given(self, key: str) -> str:
        return textwrap.shorten(" ".join(self.flags[key]), 80, placeholder=" ...")


def _flags_of_recipe(parser: StrictParser, path: str) -> dict[str, list[str]]:
    """A recipe's keys as flags, which are parsed once so that an error names the recipe. null sets a default."""
    recipe = translate(read_yaml(path, as_written=True), path)
    for key in recipe:
        check_known(key, parser.keys, path)
    if as_text(recipe.get("log_level")).lower() in _CHATTY:
        logger.warning("%s: log_level: %s is left out; --log_level=%s counts", path, *[recipe.pop("log_level")] * 2)
    flags = {}
    for key, value in recipe.items():
        action = parser.action(key)
        if value is None or (value == [] and action.nargs == "+"):
            parser.set_null(key, f"{path}: {key}")
            continue
        if key in PATH_KEYS:
            value = expand_paths(value, f"{path}: {key}")
        flags[key] = _as_flags(key, _no_for_false(value, action))
    parser.recipe = path
    parser.parse_args(_flatten(flags))
    return flags


def _flags_of_command_line(parser: StrictParser, given: dict[str, list[str]]) -> dict[str, list[str]]:
    for key in given:
        check_known(key, [*OLD_KEYS, *(option[2:] for option in parser._option_string_actions)])
    given = translate(given, "command line")
    return {
        key: _with_values(key, expand_paths(values, f"--{key}") if key in PATH_KEYS else values)
        for key, values in given.items()
    }


def _no_for_false(value: Any, action: argparse.Action) -> Any:
    """YAML 1.1 reads `no` as false, also where it is the name of a choice."""
    choices = action.choices or ()
    if value is not False or "false" in choices:
        return value
    return next((name for name in ("no", "none") if name in choices), value)


def _bool_or_auto(word: str) -> bool | str:
    """The value of a switch that may also be left to the plan. (Upstream's parser knows no switch of three values.)"""
    try:
        return "auto" if word.lower() == "auto" else string_to_bool(word)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"true, false or auto; got {word!r}") from error


def _as_flags(key: str, value: Any) -> list[str]:
    """A YAML value as the flag that a user would type."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(as_text, value)]
    return [f"--{key}={as_text(value)}"]


def _flatten(flags: dict[str, list[str]]) -> list[str]:
    return [word for words in flags.values() for word in words]


def _with_values(key: str, values: list[str]) -> list[str]:
    return [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *values]
