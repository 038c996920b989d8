"""The command line by itself, before trl and torch are imported: `--help` and misspelt keys are answered at once.

`keys.json` describes every key; docs/generate_options.py writes it from the dataclasses, and a test holds it to them.
Other versions of TRL and transformers than those may know other keys: `recipe.parse` then answers alone.
"""

import functools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import UserError, did_you_mean
from alignment.recipe.help import help_text
from alignment.recipe.old_keys import OLD_KEYS
from alignment.recipe.yaml_file import read_yaml


class CommandLine(NamedTuple):
    """`RECIPE.yaml --key=value ...`.

    Attributes:
        recipe: Path of the recipe.
        flags: The words behind each flag, by its key: `--a=1 --b 2 3 --c` is {"a": ["1"], "b": ["2", "3"], "c": []}.
    """

    recipe: str
    flags: dict[str, list[str]]


def described_keys() -> dict[str, dict[str, str]]:
    """What `keys.json` says of each key: its `group`, `type`, `default`, `help`."""
    return _file()["keys"]


def are_installed() -> bool:
    """Whether the installed packages are those that the described keys are of."""
    return all(version(package) == of_keys for package, of_keys in _file()["versions"].items())


@functools.cache
def _file() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("keys.json").read_text(encoding="utf-8"))


def check_command_line(argv: Sequence[str], about: str) -> None:
    """Prints `--help`, or ends a script whose command line or recipe has a key that is not known.

    Args:
        argv: The command line without the script's name.
        about: The script's docstring, whose first line heads the help.

    Raises:
        UserError: See `split_command_line` and `check_known`.
        SystemExit: The help was asked for: `--help`, or `--help=all` with the keys of TRL and transformers.
    """
    if {"-h", "--help", "--help=all"} & set(argv):
        everything = "--help=all" in argv or list(argv)[-2:] == ["--help", "all"]
        try:
            print(help_text(Path(sys.argv[0]).name, about.splitlines()[0], described_keys(), everything), flush=True)
        except BrokenPipeError:  # `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    path, flags = split_command_line(argv)
    if not are_installed():
        return
    for key in read_yaml(path):
        check_known(key, [*described_keys(), *OLD_KEYS], path)
    for key in flags:
        check_known(key, [*known_flags(), *OLD_KEYS])


def known_flags() -> list[str]:
    """All keys, and `no_KEY` of each switch that is on by default."""
    keys = described_keys()
    return [*keys, *(f"no_{name}" for name, key in keys.items() if (key["type"], key["default"]) == ("bool", "true"))]


def split_command_line(argv: Sequence[str]) -> CommandLine:
    """The recipe, which comes first (or after `--config`), and the flags; `-` in a flag's name is `_`.

    Raises:
        UserError: There is no recipe, or a word belongs to no flag.
    """
    words = list(argv[1:] if argv[:1] == ["--config"] else argv)
    if not words or words[0].startswith("-"):
        raise UserError("no recipe given; the first argument is a YAML file, e.g. yamls/reward_cpu.yaml")
    flags: dict[str, list[str]] = {}
    key = None
    for word in words[1:]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            flags[key] = [value] if equals else []
        elif key is None:
            raise UserError(f"command line: {word!r} belongs to no --key; write --key=value")
        else:
            flags[key].append(word)
    return CommandLine(words[0], flags)


def check_known(key: str, known: Iterable[str], recipe: str | None = None) -> None:
    """Ends a run at a key that is not known; names the nearest one.

    Args:
        key: The key.
        known: All keys that there are.
        recipe: Path of the recipe that has it; None: it is a flag.

    Raises:
        UserError: It is not known.
    """
    if key in known:
        return
    if recipe is None:
        hint = did_you_mean(f"--{key}", [f"--{name}" for name in known])
        raise UserError(f"unknown flag --{key}; {hint or 'see --help=all for all keys'}")
    raise UserError(f"{recipe}: unknown key {key!r}; {did_you_mean(key, known) or 'see --help=all for all keys'}")
