"""Functions of a user's file, `FILE.py:NAME`: a loss, a reward function."""

import contextlib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Of the names under which the files are modules.
_PREFIX = "user_code_"


def names_a_file(spec: str) -> bool:
    """Whether a setting is of the form `FILE.py:NAME`."""
    return spec.rpartition(":")[0].endswith(".py")


def load_function(spec: str) -> Callable[..., Any]:
    """Loads a function from `FILE.py:NAME`.

    The file is a module like any other: it is in `sys.modules`, where dataclasses with postponed annotations look
    for it, and may import the files beside it.

    Raises:
        ValueError: No such file or function, or the file fails; names its line.
    """
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"{spec!r} names no file; write FILE.py:NAME")
    path = Path(file).resolve()
    module_name = f"{_PREFIX}{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"  # hides no module of its name
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{file} is no Python file; write FILE.py:NAME")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        with _first_in_path(str(path.parent)):
            _forget_namesakes(path.parent)
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} cannot be loaded: {in_words(error, str(path))}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file} has no function {name!r}")
    return getattr(module, name)


def in_words(error: BaseException, file: str | None) -> str:
    """An error with its line: the last one in a file that its traceback passed, or in any."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    place = error if isinstance(error, SyntaxError) else (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename or '').name}, line {place.lineno})"


@contextlib.contextmanager
def _first_in_path(folder: str) -> Iterator[None]:
    """Looks for modules in a folder first, as for a script; and from then on last, for imports inside of functions."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _forget_namesakes(folder: Path) -> None:
    """Has a `utils.py` beside this file imported, where another user's file has brought one of its own."""
    others = {Path(m.__file__ or "").parent for name, m in sys.modules.items() if name.startswith(_PREFIX)} - {folder}
    for file in folder.glob("*.py"):
        namesake = getattr(sys.modules.get(file.stem), "__file__", None)
        if namesake is not None and Path(namesake).resolve().parent in others:
            del sys.modules[file.stem]
