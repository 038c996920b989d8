"""A hash of code, for caches: what a changed engine or reader wrote before is not taken for what it would write now."""

import ast
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path


def code_hash(modules: Sequence[str]) -> str:
    """A hash of the source of some modules, and of all modules of their packages that they import.

    Args:
        modules: Full names, such as `trl_nca.logps`. They are read, not imported.
    """
    return hashlib.sha256(b"".join(file.read_bytes() for file in code_files(modules))).hexdigest()


def code_files(modules: Sequence[str]) -> list[Path]:
    """The source files that `code_hash` reads, in the order of their modules' names."""
    files: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in files:
            files[name] = Path(importlib.util.find_spec(name).origin)
            todo += _imports(files[name], package=name.rpartition(".")[0])
    return [files[name] for name in sorted(files)]


def _imports(file: Path, package: str) -> list[str]:
    """Modules of a package that a file of it imports."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found += [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            found.append(node.module)
    return found
