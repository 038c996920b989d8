"""The user's mistakes: one line on stderr that says where and what to do, and exit code 2."""

import logging
import os
import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a recipe, a file or a flag. The message names file, key or row, and the fix."""


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a `UserError` ends it with one line and exit code 2, anything else with a traceback."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    # Notices of one upstream package to another about names that are to change; no user can act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate|peft)\.")
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # once, not once a process
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
