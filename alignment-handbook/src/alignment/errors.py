"""Errors of the user: one line on stderr that says where and what to do, and exit code 2."""

import argparse
import difflib
import errno
import functools
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

#: Messages of gloo and NCCL when a process that they wait for is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class UserError(Exception):
    """An error in a recipe, a file or a flag. The message names file, key or row, and the fix."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse for scripts without a recipe: no abbreviated flags, defaults in `--help`, errors as a `UserError`."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        check_flags(sys.argv[1:] if args is None else args, self._option_string_actions)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UserError(f"command line: {with_nearest(message) or message + '; see --help'}")


def with_nearest(message: str) -> str:
    """A message that lists the choices there are, and the nearest of them; "" where it lists none, or none is near."""
    listed = re.search(r"'([^']*)'.*?(?:choose one of|choose from|select one of) (.*)", message)
    hint = did_you_mean(listed[1], re.findall(r"[\w-]+", listed[2])) if listed else ""
    return f"{message}; {hint}" if hint else ""


def check_flags(words: Iterable[str], known: Iterable[str]) -> None:
    """Ends a script at a flag that it does not have. (argparse first misses a needed one: often the same, misspelt.)

    Raises:
        UserError: Names the nearest flag.
    """
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag != "--" and flag not in known:
            raise UserError(f"unknown flag {flag}; {did_you_mean(flag, known) or 'see --help'}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest to one that is not known, as a question; "" where none is near.

    Example:
        >>> did_you_mean("betta", ["alpha", "beta"])
        "did you mean 'beta'?"
        >>> did_you_mean("--betta", ["--alpha", "--beta"])
        'did you mean --beta?'
    """
    by_lower = {name.lower().lstrip("-"): name for name in known}
    nearest = difflib.get_close_matches(word.lower().lstrip("-"), by_lower, n=1, cutoff=0.5)
    if not nearest:
        return ""
    name = by_lower[nearest[0]]
    return f"did you mean {name if name.startswith('-') else repr(name)}?"


def run(main: Callable[[], None], exit_on_sigterm: bool = False) -> None:
    """Runs a script's `main`; a `UserError` ends it with one line and exit code 2, anything else with a traceback.

    Args:
        main: What to run.
        exit_on_sigterm: Whether SIGTERM ends the program with one line and exit code 143. (While a trainer trains it
            has a handler of its own, which saves a checkpoint and exits with 0.)
    """
    if not sys.stderr.isatty():
        _hide_bars()
    is_main = os.environ.get("RANK", "0") == "0"  # messages are printed once, not once a process
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING if is_main else logging.ERROR)
    # Notices of one upstream package to another about names that are to change; no user can act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate|peft)\.")
    if exit_on_sigterm:
        signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        main()
    except UserError as error:
        if is_main:
            print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}; make room", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "WORLD_SIZE" in os.environ and any(sign in str(error) for sign in _LOST_PEER):
            traceback.print_exc()
            print(
                f"error: another process of this run has died ({_one_line(error)}); the newest checkpoint is "
                "untouched, --resume_from_checkpoint=true resumes from it",
                file=sys.stderr,
            )
            sys.exit(1)
        raise


def _hide_bars() -> None:
    """Switches progress bars off, in modules that are imported and in those that will be.

    For output that is no terminal: in a file, each bar is a line of thousands of characters.
    """
    if os.environ.get("TQDM_DISABLE"):
        return
    os.environ |= dict.fromkeys(
        ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1"
    )
    if "tqdm" in sys.modules:
        bar = sys.modules["tqdm"].tqdm
        bar.__init__ = functools.partialmethod(bar.__init__, disable=True)
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _exit_on_signal(number: int, frame: Any) -> NoReturn:
    """Exits with 128 + the signal, as a shell reports it, and not with 0: results are missing."""
    print("Stopped by SIGTERM outside of training: the results are not written", flush=True)
    sys.exit(128 + number)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
