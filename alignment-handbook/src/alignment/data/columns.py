"""Gives the columns of a row the names that forms are recognised by: the recipe's key `columns`."""

import json
import re
from typing import Any

from alignment.data.row import Row
from alignment.data.written import read_written
from alignment.errors import did_you_mean

#: Names that a column may be given.
TARGETS = (
    "prompt", "system", "responses", "scores", "chosen", "rejected", "score_chosen", "score_rejected",
    "prompt_id", "response", "score", "completion", "label", "weight", "tools", "chat_template_kwargs",
)  # fmt: skip

_OF_NUMBERS = re.compile(r"scores?(_\w+)?|label|weight")
#: Columns that the group is made of, which are not handed to a reward function.
_OF_GROUP = re.compile(r"prompts?|responses|scores|rewards|score_parts|completions|chosen|rejected|(score_)?A\d+")


def check(columns: Any) -> None:
    """Checks the recipe's key.

    Raises:
        ValueError: It is no mapping, gives an unknown name, or a column is no text.
    """
    if not isinstance(columns, dict):
        raise ValueError(f"columns: not a mapping of {', '.join(TARGETS[:4])}, ... to your columns: {columns!r}")
    for target, paths in columns.items():
        if target not in TARGETS:
            hint = did_you_mean(str(target), TARGETS) or f"they are {', '.join(TARGETS)}"
            raise ValueError(f"columns: unknown name {target!r}; {hint}")
        is_many = isinstance(paths, list) and paths and target in ("responses", "scores")
        if not all(isinstance(path, str) and path for path in (paths if is_many else [paths])):
            raise ValueError(f"columns: {target}: the name of a column, or a list of them for responses and scores")


def paths_of(columns: dict[str, Any] | None) -> list[str]:
    """All columns that the key names."""
    return [path for paths in (columns or {}).values() for path in (paths if isinstance(paths, list) else [paths])]


def text_columns(columns: dict[str, Any] | None) -> list[str]:
    """The columns that the key says are texts, whatever they look like."""
    are_texts = {target: path for target, path in (columns or {}).items() if not _OF_NUMBERS.fullmatch(target)}
    return paths_of(are_texts)


def rename(row: Row, columns: dict[str, Any] | None) -> tuple[Row, list[str]]:
    """A row with its columns under the names that the key gives them.

    Args:
        row: The row as it was read.
        columns: Name -> the column, or for `responses` and `scores` a list of columns. A path with dots goes into
            objects, and into each object of a list: `answers.text`.

    Returns:
        The row, and the columns of the key that it has. A row that has none of them stays as it is.
    """
    values = {path: look_up(row, path) for path in paths_of(columns)}
    found = [path for path, value in values.items() if value is not _MISSING]
    if not columns or not found:
        return row, found
    present = {path: None if value is _MISSING else value for path, value in values.items()}
    renamed = {name: value for name, value in row.items() if not any(_is_of(name, path) for path in found)}
    for target, paths in columns.items():
        renamed[target] = [present[path] for path in paths] if isinstance(paths, list) else present[paths]
    return renamed, found


_MISSING = object()


def look_up(value: Any, path: str) -> Any:
    """The value at a dotted path, a list of them where the path goes through a list; `_MISSING` where there is none."""
    if not path:
        return value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = read_written(value)
    head, _, rest = path.partition(".")
    if isinstance(value, dict):
        if path in value:
            return value[path]
        return look_up(value[head], rest) if head in value else _MISSING
    if not isinstance(value, list):
        return _MISSING
    if head.isdigit():
        return look_up(value[int(head)], rest) if int(head) < len(value) else _MISSING
    items = [look_up(item, path) for item in value]
    return [None if item is _MISSING else item for item in items] if any(i is not _MISSING for i in items) else _MISSING


def _is_of(name: Any, path: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def suggestion(row: Row) -> str:
    """The key that might fit a row of an unknown form, as a user would write it.

    Example:
        >>> suggestion({"topic": "Primes", "ask": "Name one.", "replies": ["7", "8"], "marks": [1, 0]})
        'columns: {prompt: ask, responses: replies, scores: marks}'
    """
    guess = _guess(row)
    return f"columns: {{{', '.join(f'{target}: {name or _PLACE[target]}' for target, name in guess.items())}}}"


#: What stands for a column that nothing in the row looks like.
_PLACE = {target: f"YOUR_{target.upper()}_COLUMN" for target in TARGETS}
#: Words in the names of columns that hold prompts, and of those with scores.
_PROMPT_WORDS = ("prompt", "question", "instruction", "query", "ask", "input", "user", "context", "problem", "post")
_SCORE_WORDS = ("score", "rating", "reward", "mark", "grade", "point", "quality", "vote", "label")


def _guess(row: Row) -> dict[str, str | None]:
    numbers = [name for name, value in row.items() if _is_number(value)]
    rated = [name for name in numbers if _has_word(name, _SCORE_WORDS)] or numbers
    if "chosen" in row and "rejected" in row:
        first, second, *_ = [*rated, None, None]
        return {"score_chosen": first, "score_rejected": second}
    prompt = _prompt_column(row)
    texts, scores = _lists(row)
    answers = [name for name, value in row.items() if isinstance(value, str) and name != prompt]
    texts, scores = texts or _series(answers), scores or _series(rated)
    if not texts and answers and rated:
        return {"prompt": prompt, "response": answers[0], "score": rated[0]}
    return {"prompt": prompt, "responses": texts[0] if texts else None, "scores": scores[0] if scores else None}


def _prompt_column(row: Row) -> str | None:
    """The first column by the order of the words, that is text, or the first text inside of it."""
    for word in _PROMPT_WORDS:
        for name, value in row.items():
            if word in str(name).lower() and isinstance(value, str | list):
                return name
            if word in str(name).lower() and isinstance(value, dict):
                return next((f"{name}.{key}" for key, item in value.items() if isinstance(item, str)), None)
    return None


def _series(names: list[str]) -> list[str]:
    """Columns whose names differ in a number or letter at their end, `[answer_a, answer_b]`."""
    series: dict[str, list[str]] = {}
    for name in names:
        if found := re.fullmatch(r"(.*?)[_-]?(\d+|[abAB])", name):
            series.setdefault(found[1], []).append(name)
    return [f"[{', '.join(same)}]" for same in series.values() if len(same) > 1]


def _lists(row: Row) -> tuple[list[str], list[str]]:
    """Columns that are lists of texts, and of numbers, or lists of objects that hold them."""
    lists = {name: value for name, value in row.items() if isinstance(value, list) and value}
    texts = [name for name, value in lists.items() if all(isinstance(item, str) for item in value)]
    numbers = [name for name, value in lists.items() if all(_is_number(item) for item in value)]
    for name, value in lists.items():
        if isinstance(value[0], dict) and not {"role", "from"} & value[0].keys():
            texts += [f"{name}.{key}" for key, item in value[0].items() if isinstance(item, str)][:1]
            numbers += [f"{name}.{key}" for key, item in value[0].items() if _is_number(item)][:1]
    return texts, numbers


def _has_word(name: Any, words: tuple[str, ...]) -> bool:
    return any(word in str(name).lower() for word in words)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def other_columns(row: Row) -> str:
    """The columns of a raw row that a reward function is given by name, as a JSON object; "" for none."""
    names = [name for name in row if not _OF_GROUP.fullmatch(str(name))]
    return json.dumps({name: row[name] for name in names}, default=str) if names else ""


def common_columns(texts: list[str]) -> str:
    """Of the `other_columns` of several rows those that say the same in all, as a JSON object; "" for none.

    Example:
        >>> common_columns(['{"gold": 7, "annotator": "a"}', '{"gold": 7, "annotator": "b"}'])
        '{"gold": 7}'
    """
    first, *rest = [json.loads(text) if text else {} for text in texts]
    common = {name: value for name, value in first.items() if all(name in r and r[name] == value for r in rest)}
    return json.dumps(common) if common else ""
