"""Writes the option tables of docs/scripts/ from the scripts' own parsers, between two markers in each page.

    make docs

run_reward.md lists the keys of this project's dataclasses; those of TRL and transformers are in their own pages. All of
them are written to keys.json too, from which run_reward.py prints its help without importing the dataclasses.
"""

import argparse
import dataclasses
import json
import runpy
import sys
import typing
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from alignment.configs import Configs
from alignment.recipe import flags
from trl_nca.config import UNSUPPORTED

PAGES = Path(__file__).resolve().parent / "scripts"
SCRIPTS = PAGES.parent.parent / "alignment-handbook" / "scripts"
START, END = "<!-- Written by `make docs`. -->", "<!-- End of what `make docs` writes. -->"
KEYS = Path(flags.__file__).with_name("keys.json")
RECIPES = PAGES.parent.parent / "yamls"
#: Groups of the help for keys of this project, by the field of `Configs`.
GROUPS = {"trainer": "loss", "data": "data", "policy": "model", "run": "run"}
#: Headings of run_reward.md, by the field of `Configs`.
HEADINGS = {"trainer": "Loss, memory, resuming", "data": "Data", "policy": "Model", "run": "Run"}


class _Parsed(Exception):
    """Carries the parser of a script out of it."""


def find_parser(script: Path) -> argparse.ArgumentParser:
    """The parser that a script makes, before it parses anything."""

    def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise _Parsed(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), mock.patch.object(sys, "argv", ["-"]):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Parsed as parsed:
            return parsed.args[0]
    raise ValueError(f"{script} parses no command line")


def option_rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each option, positional ones first."""
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if not isinstance(action, argparse._HelpAction):
            name = action.option_strings[0] if action.option_strings else (action.metavar or action.dest).upper()
            text = action.help[0].upper() + action.help[1:]
            yield name, "needed" if action.required else _default(action.default), _meaning(text, action.choices)


def own_keys(config: type) -> list[str]:
    """The keys of a dataclass that this project adds or changes, as they stand in the source."""
    classes = [base for base in config.__mro__ if base.__module__.split(".")[0] in ("alignment", "trl_nca")]
    return [name for base in classes for name in base.__annotations__]


def described_keys() -> str:
    """The text of keys.json: whose keys they are; and group, type, default and meaning of each, a line each.

    TRL's and transformers' keys that no recipe of this project sets are in the group "upstream", and those that the
    trainers refuse in the group "refused".
    """
    used = {key for path in RECIPES.glob("*.yaml") for key in yaml.safe_load(path.read_text())}
    lines = {}
    for part, config in Configs.__annotations__.items():
        hints, own = typing.get_type_hints(config), own_keys(config)
        fields = [field for field in dataclasses.fields(config) if field.init]
        if part == "trainer":  # a key that upstream has too stands among upstream's
            fields.sort(key=lambda field: own.index(field.name) if field.name in own else len(own))
        for field in fields:
            name = field.name
            group = GROUPS[part] if name in own or part == "policy" else "training"
            if name not in {*own, *used}:
                group = "upstream"
            described = {
                "group": "refused" if name in UNSUPPORTED else group,
                "type": _type(hints[name]),
                "default": _default(_default_of(field)).strip("`"),
                "help": _meaning(" ".join(field.metadata.get("help", "").split()), field.metadata.get("choices")),
            }
            lines[name] = f"{json.dumps(name)}: {json.dumps(described, ensure_ascii=False)}"
    versions = json.dumps({package: version(package) for package in ("transformers", "trl")})
    return f'{{"versions": {versions},\n"keys": {{\n' + ",\n".join(lines.values()) + "\n}}\n"


def key_rows(config: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each key that a dataclass has from this project, in the order of the fields."""
    own = own_keys(config)
    for field in dataclasses.fields(config):
        if field.name in own and field.init:
            yield (
                field.name,
                _default(_default_of(field)),
                _meaning(field.metadata["help"], field.metadata.get("choices")),
            )


def with_tables(page: Path) -> str:
    """The text of a page, its tables written anew; of a page without markers the text as it is."""
    text = page.read_text()
    if START not in text:
        return text
    before, rest = text.split(START)
    if page.stem == "run_reward":
        configs = Configs.__annotations__
        parts = [f"### {heading}\n\n{_table('key', key_rows(configs[field]))}" for field, heading in HEADINGS.items()]
    else:
        parts = [_table("option", option_rows(find_parser(SCRIPTS / f"{page.stem}.py")))]
    return "\n\n".join([f"{before}{START}", *parts, f"{END}{rest.split(END)[1]}"])


def _table(head: str, rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in rows]
    return "\n".join([f"| {head} | default | |", "|---|---|---|", *lines])


def _type(hint: Any) -> str:
    """The type of a value as a user writes it; the first of several."""
    names = {bool: "bool", int: "int", float: "float", str: "text"}
    hints = {getattr(part, "__origin__", part) for part in (typing.get_args(hint) or [hint])}
    return next((name for kind, name in names.items() if kind in hints), "mapping" if dict in hints else "list")


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _default(value: Any) -> str:
    if value is None or value is argparse.SUPPRESS or value in ("", []):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(text: str, choices: Iterable[Any] | None) -> str:
    """A help text as a sentence without a full stop, with the choices that it does not name."""
    text = text.replace("%%", "%").replace("|", r"\|").rstrip(".")
    named = f" ({', '.join(f'`{choice}`' for choice in choices or ())})"
    return text + (named if any(str(choice) not in text for choice in choices or ()) else "")


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(with_tables(path))
    KEYS.write_text(described_keys(), encoding="utf-8")
