"""Reads a YAML mapping: each key once, numbers as YAML 1.2 has them, words as they are written."""

import re
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError

_NUMBER_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
#: Numbers that YAML alone reads.
_YAML_ONLY = re.compile(r"[-+]?(0[xb]|\.inf|\.nan)", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `1e-5` is a text: a float needs a point and a signed exponent there."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def read_yaml(path: str, as_written: bool = False) -> dict[str, Any]:
    """A YAML mapping from a file.

    Args:
        path: The file.
        as_written: Keep the mapping's own numbers as the texts that they are in the file, for who converts them by the
            type of their key: `model_revision: 0012e4` is no number, and `run_name: 12:30` is not 750. At any depth
            below, numbers are numbers.

    Raises:
        UserError: No such file, not YAML, a key that stands twice (with the line), or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        _check_unique_keys(root, path)
        if as_written and isinstance(root, yaml.MappingNode):
            _keep_numbers_as_written(root)
        recipe = loader.construct_document(root) if root is not None else None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise UserError(f"{path}: a recipe is a mapping of 'key: value' lines, and this is none")
    return recipe


def _check_unique_keys(node: yaml.Node | None, path: str) -> None:
    """YAML takes the last of two equal keys without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_unique_keys(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in lines:
            raise UserError(
                f"{path}, line {line}: the key {key.value!r} stands twice, first in line {lines[key.value]}; keep one"
            )
        lines[key.value if isinstance(key, yaml.ScalarNode) else f"line {line}"] = line
        _check_unique_keys(value, path)


def _keep_numbers_as_written(root: yaml.MappingNode) -> None:
    for _, value in root.value:
        if value.tag in _NUMBER_TAGS and not _YAML_ONLY.match(value.value):
            value.tag = "tag:yaml.org,2002:str"
