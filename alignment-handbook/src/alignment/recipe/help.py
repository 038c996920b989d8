"""The text of `--help`: the keys by group, each with its default and what it does."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping

#: Headings by group, in the order in which they are printed; the last by `--help=all` alone.
GROUPS = {
    "loss": "Loss and memory",
    "data": "Data",
    "model": "Model",
    "training": "Training",
    "run": "Run",
    "upstream": "All other keys of TRL and transformers",
}
_INDENT = 30


def help_text(script: str, about: str, keys: Mapping[str, Mapping[str, str]], everything: bool) -> str:
    """The help of a script that takes a recipe.

    Args:
        script: The script's file name, or `nca` and its command.
        about: What it does, in a line.
        keys: `flags.described_keys()`. Those of a group that has no heading here are refused, and not named.
        everything: Whether to describe upstream's keys too, and each in full; else in the first sentence.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    command = f"python {script}" if script.endswith(".py") else script
    lines = [f"usage: {command} RECIPE.yaml [--key=value ...]", "", about, ""]
    lines += textwrap.wrap(
        "Each key of a recipe is also a flag, and flags win; `--key=` takes the recipe's key back. Recipes are in "
        "yamls/. "
        + (
            "Here are all keys."
            if everything
            else "Here are the keys that most runs need; --help=all has all, in full."
        ),
        width,
    )
    for group, heading in GROUPS.items():
        if group != "upstream" or everything:
            lines += ["", f"{heading}:"]
            for name, key in keys.items():
                if key["group"] == group:
                    lines += _described(name, key, everything, width)
    return "\n".join(lines)


def _described(name: str, key: Mapping[str, str], in_full: bool, width: int) -> Iterator[str]:
    """A key's lines: name and default, and beside them what it does."""
    text = key["help"] if in_full else re.split(r"[.;] ", key["help"])[0]
    default = f"[{key['default']}] " if key["default"] else ""
    head = f"  --{name}"
    beside = textwrap.wrap(default + text, max(width - _INDENT, 30))
    if len(head) > _INDENT - 2:
        yield head
        head = ""
    for line in beside or [""]:
        yield f"{head:<{_INDENT}}{line}".rstrip()
        head = ""
