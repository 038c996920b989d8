"""Writes files whole or not at all, and finds those that come with the project."""

import importlib.resources
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write a file or a folder to, and renames it to `path` at the end.

    An error leaves nothing behind; a kill leaves `.NAME.partial` at most, which the next call removes.
    """
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any | None:
    """Reads a JSON file; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def shipped(name: str) -> Path:
    """Path of a file or folder that comes with the project: `yamls`, `scripts`, `recipes`, and `run_*.py`.

    A wheel has the folders inside the package and the files beside it, a clone where git has them: beside `src`, and at
    its root.
    """
    package = Path(str(importlib.resources.files("alignment")))
    places = [folder / name for folder in (package, *package.parents[:3])]
    return next((path for path in places if path.exists()), places[0])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
