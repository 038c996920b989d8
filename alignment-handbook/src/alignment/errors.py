"""The user's mistakes: one line on stderr that says where and what to do, and exit code 2."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake in a recipe, a file or a flag. The message names file, key or row, and the fix."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse for scripts without a recipe: no abbreviated flags, defaults in `--help`, mistakes as a `UserError`."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see --help")


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a `UserError` ends it with one line and exit code 2, anything else with a traceback."""
    is_main = os.environ.get("RANK", "0") == "0"  # what is said is said once, not once a process
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING if is_main else logging.ERROR)
    # Notices of one upstream package to another about names that are to change; no user can act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate|peft)\.")
    try:
        main()
    except UserError as error:
        if is_main:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
