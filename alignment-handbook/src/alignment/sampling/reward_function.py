"""Reward functions: loaded from a file and called in one way, wherever responses are scored."""

import inspect
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.data.row import Row, as_turns
from alignment.errors import UserError
from alignment.resumable import content_hash, fingerprint
from trl_nca.user_code import in_words, load_function

RewardFunction = Callable[..., list[float | None]]
#: Scores of one row's responses. None: the scorer does not apply.
Scores = list[float | None]

#: Columns that a reward function is not given by name.
_NOT_PASSED = ("prompt", "responses", "scores", "score_parts")


def load_reward_function(spec: str) -> RewardFunction:
    """Loads a function (prompts, completions, **columns) -> scores, TRL's signature, from `FILE.py:NAME`.

    Raises:
        UserError: No such file or function, or the file fails; names its line.
    """
    try:
        return load_function(spec)
    except ValueError as error:
        raise UserError(f"reward_function: {error}") from error


def code_fingerprint(spec: str) -> str:
    """A hash that changes when the file of a loaded function does, or one beside it that it has imported."""
    file = Path(spec.rpartition(":")[0]).resolve()
    loaded = {
        Path(module.__file__).resolve() for module in [*sys.modules.values()] if getattr(module, "__file__", None)
    }
    beside = sorted(path for path in loaded if path.parent == file.parent and path != file)
    hashes = [fingerprint(str(path)) for path in (file, *beside)]
    return content_hash(hashes) if beside else hashes[0]


def call_reward_function(function: RewardFunction, name: str, rows: list[Row], locations: list[str]) -> list[Scores]:
    """Scores the rows' responses by a Python function, which is called once.

    Args:
        function: From `load_reward_function`. Given: a prompt (messages) and a completion (one assistant message, or
            all messages of a response of several turns) for each response, and those of the rows' other columns that it
            takes by name, as often.
        name: Name of the function, for errors.
        rows: `prompt` as messages, and `responses`.
        locations: Where the rows stand, for errors.

    Raises:
        UserError: It needs an argument that is not given, or cannot take one; it fails, and on which row; it returns
            too few or too many scores, or one that is no finite number and not None.
    """
    given = _arguments(function, rows)
    num_responses = len(given["completions"])
    if not num_responses:
        return [[] for _ in rows]
    _check_call(function, name, given, locations[0])
    try:
        returned = _take(function(**given), num_responses)
    except UserError as error:
        raise UserError(f"{_span(locations)}: {name} {error}; it must return one for each completion") from None
    except Exception as error:
        raise _failure(function, name, rows, locations, error) from error
    if len(returned) != num_responses:
        raise UserError(
            f"{_span(locations)}: {name} returned {len(returned)} scores for {num_responses} responses; it must return "
            "one for each completion"
        )
    scores = iter(returned)
    return [
        [_number(next(scores), f"{location}, response {k + 1}: {name}") for k in range(len(row["responses"]))]
        for row, location in zip(rows, locations, strict=True)
    ]


def call_score_parts(
    function: RewardFunction, name: str, rows: list[Row], locations: list[str]
) -> list[dict[str, Scores]] | None:
    """What the scores are made of, by a function NAME_parts beside the reward function NAME; None without one.

    Args:
        function, name, rows, locations: As for `call_reward_function`. NAME_parts takes the same, and returns for each
            completion a dict of numbers, or of True and False for conditions that are met or not.

    Returns:
        For each row, by the name of the part, a number for each response; None where it has no such part.

    Raises:
        UserError: It fails, or returns something else.
    """
    module = sys.modules.get(getattr(function, "__module__", ""))
    parts = getattr(module, f"{getattr(function, '__name__', '')}_parts", None)
    if parts is None:
        return None
    given = _arguments(parts, rows)
    try:
        returned = iter(_take(parts(**given), len(given["completions"])))
        found = [[dict(next(returned)) for _ in row["responses"]] for row in rows]
        names = [list(dict.fromkeys(part for one in of_row for part in one)) for of_row in found]
        return [
            {part: [_number(one.get(part), f"{name}_parts, {part!r}") for one in of_row] for part in of_names}
            for of_row, of_names in zip(found, names, strict=True)
        ]
    except UserError:
        raise
    except Exception as error:
        reason = in_words(error, getattr(getattr(parts, "__code__", None), "co_filename", None))
        raise UserError(
            f"{_span(locations)}: {name}_parts fails: {reason}; it must return a dict of numbers for each completion"
        ) from error


def _arguments(function: RewardFunction, rows: list[Row]) -> dict[str, list[Any]]:
    each = [(row, response) for row in rows for response in row["responses"]]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _NOT_PASSED))
    given = {name: [row.get(name) for row, _ in each] for name in names if _takes(function, name)}
    given["prompts"] = [row["prompt"] for row, _ in each]
    given["completions"] = [as_turns(response) for _, response in each]
    return given


def _take(returned: Any, count: int) -> list[Any]:
    """The values of a list or an array; of a generator, which need not end, at most one more than `count`."""
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__iter__"):
        raise UserError(f"returned {returned!r:.60} and no list of scores")
    return list(returned if hasattr(returned, "__len__") else itertools.islice(returned, count + 1))


def _failure(function: RewardFunction, name: str, rows: list[Row], locations: list[str], error: Exception) -> UserError:
    """The error for a function that fails on these rows: on the first of them that it fails on alone, if one does."""
    found = _span(locations)
    for row, location in zip(rows, locations, strict=True):
        given = _arguments(function, [row])
        try:
            _take(function(**given), len(given["completions"]))
        except Exception as alone:
            found, error = location, alone
            break
    code = getattr(inspect.unwrap(function), "__code__", None)
    reason = in_words(error, getattr(code, "co_filename", None))
    return UserError(f"{found}: {name} fails: {reason}; return None where it does not apply")


def _span(locations: list[str]) -> str:
    return f"{locations[0]} and {len(locations) - 1} rows more" if len(locations) > 1 else locations[0]


def _takes(function: RewardFunction, name: str) -> bool:
    """Whether a function takes an argument of this name, by itself or in its `**columns`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_call(function: RewardFunction, name: str, given: dict[str, Any], location: str) -> None:
    try:
        inspect.signature(function).bind(**given)
    except ValueError:  # of a builtin
        return
    except TypeError as error:
        raise UserError(f"{location}: {name} {error}; it is called with {', '.join(given)}, by name") from error


def _number(value: Any, location: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{location} returned {value!r}; return a finite number, or None where it does not apply")
    return number
