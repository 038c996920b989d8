"""The forms that give K responses to a prompt in one row, each a function that recognises it by its columns.

A form returns the responses and the scores as its columns have them, or None for a row of another form.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from alignment.data import ultrafeedback
from alignment.data.columns import suggestion
from alignment.data.row import BadRow, Row, as_number
from alignment.data.written import as_objects, is_empty, read_written

#: Columns that are a list of responses, and of their scores.
RESPONSES = ("responses", "all_generated_responses", "generations", "completions", "candidates", "outputs", "answers")
_SCORES = ("scores", "rewards", "all_rm_scores", "rm_scores", "ratings", "rating")
#: Keys of the objects in a list of responses.
_TEXT_KEYS = ("response", "answer", "text", "content", "completion", "output", "generation", "messages", "trajectory",
              "conversation", "conversations")  # fmt: skip
_SCORE_KEYS = ("score", "reward", "rating", "rm_score")
#: Two responses, and a number that is the more above 0 the better the second is.
_PREFERENCES = (
    ("response1", "response2", "overall_preference"),
    ("response_1", "response_2", "preference_strength"),
)


class Fields:
    """The columns of a row; it notes those that are read."""

    def __init__(self, row: Row):
        self.row = row
        self._read: set[Any] = set()

    def take(self, name: str) -> Any:
        """The value of a column."""
        self._read.add(name)
        return self.row.get(name)

    def take_list(self, name: str) -> Any:
        """The value of a column that is a list, or a text that spells one."""
        return _as_list(self.take(name))

    def first(self, *names: str) -> str | None:
        """The first of the columns that has a value."""
        return next((name for name in names if not is_empty(self.row.get(name))), None)

    def first_list(self, *names: str) -> str | None:
        """The first of the columns that is a list of values, and not of objects that hold more than a message."""
        for name in names:
            values = _as_list(self.row.get(name))
            if isinstance(values, list) and values and not any(_is_scored_object(item) for item in values):
                return name
        return None

    def unread(self) -> list[str]:
        """The columns that have a value and were not read."""
        return [f"column {name}" for name, value in self.row.items() if name not in self._read and not is_empty(value)]


@dataclass
class Scored:
    """Responses and their scores as a form gives them; see `Group`."""

    responses: Any
    scores: Any
    fixed: list[str] = field(default_factory=list)
    ranked: bool = False


def find_responses(fields: Fields, pairs: bool, unscored_pairs: bool, make_pairs: bool, score: str) -> Scored:
    """The responses of a row and their scores; see `formats.to_group`.

    Raises:
        BadRow: It is of no known form.
    """
    row = fields.row
    is_pair = "chosen" in row and "rejected" in row and not (row["chosen"] is None and row["rejected"] is None)
    if pairs and not make_pairs and is_pair:
        return _ranked_pair(fields)
    for form in _FORMS:
        found = form(fields, score)
        if found is not None:
            return found
    if is_pair and (pairs or unscored_pairs):
        _refuse_other_scores(row)
        return _ranked_pair(fields)
    is_numbered_pair = all(name in row for name in ("response_0", "response_1", "better_response_id"))
    if is_numbered_pair and (pairs or unscored_pairs):
        return _ranked_byas_number(fields)
    columns = f"its columns are {', '.join(map(str, row)) or 'none'}"
    if is_pair or is_numbered_pair:
        hint = f", or say where they are, such as {suggestion(row)}" if is_pair else ""
        raise BadRow("unknown_format", f"a pair without scores; {columns}; use run_preference.py{hint}")
    raise BadRow("unknown_format", f"{columns}; say which is which, such as {suggestion(row)}" if row else columns)


def _list(fields: Fields, score: str) -> Scored | None:
    row = fields.row
    responses = fields.first_list(*RESPONSES)
    scores = fields.first_list(*_SCORES, "ranks", "rank")
    if "responses" in row and ("scores" in row or "rewards" in row):  # by these names, whatever they hold
        responses, scores = "responses", "scores" if row.get("scores") is not None else "rewards"
    elif responses is None or scores is None or "score_chosen" in row:
        return None
    numbers = fields.take_list(scores)
    if scores in ("ranks", "rank"):
        numbers = [_from_rank(rank) for rank in numbers]
    return Scored(fields.take_list(responses), numbers)


def _numbered(fields: Fields, score: str) -> Scored | None:
    row = fields.row
    if "A0" not in row or "score_A0" not in row:
        return None
    names = sorted((k for k in row if re.fullmatch(r"A\d+", str(k))), key=lambda k: int(k[1:]))
    # Tables fill ragged rows up with nulls.
    names = [k for k in names if row[k] is not None or row.get(f"score_{k}") is not None]
    return Scored([fields.take(k) for k in names], [fields.take(f"score_{k}") for k in names])


def _scored_pair(fields: Fields, score: str) -> Scored | None:
    row = fields.row
    if "chosen" not in row or "rejected" not in row:
        return None
    names = [name.replace("rejected", "chosen") for name in row if _PAIR_SCORE.fullmatch(str(name))]
    names.sort(key=lambda name: (name != "score_chosen", len(name)))
    if not names:
        return None
    return Scored(
        [fields.take("chosen"), fields.take("rejected")],
        [fields.take(names[0]), fields.take(names[0].replace("chosen", "rejected"))],
    )


#: Names of columns with scores, and of those with the score of one of a pair: score_chosen, chosen-rating, ...
_SCORE_NAME = re.compile(r"(?:\w+[_-])?(?:score|rating|reward|grade|quality|point)s?")
_PAIR_SCORE = re.compile(
    rf"(?:{_SCORE_NAME.pattern}[_-](?:\w+[_-])?(?:chosen|rejected))|(?:(?:chosen|rejected)[_-]{_SCORE_NAME.pattern})"
)


def _ultrafeedback(fields: Fields, score: str) -> Scored | None:
    row = fields.row
    completions = as_objects(_as_list(row.get("completions")))
    if "instruction" not in row or not isinstance(completions, list):
        return None
    fields.take("completions")
    return Scored(*ultrafeedback.scores_of(completions, score))


def _objects(fields: Fields, score: str) -> Scored | None:
    """A list of objects, each with a text and its score or rank: Nectar's `answers`."""
    for name in RESPONSES:
        objects = as_objects(_as_list(fields.row.get(name)))
        if not isinstance(objects, list) or not objects or not all(isinstance(item, dict) for item in objects):
            continue
        text = _common_key(objects, _TEXT_KEYS)
        number = _common_key(objects, (*_SCORE_KEYS, "rank"))
        if text and number:
            fields.take(name)
            numbers = [item.get(number) for item in objects]
            scores = [_from_rank(rank) for rank in numbers] if number == "rank" else numbers
            return Scored([item.get(text) for item in objects], scores)
    return None


def _preference(fields: Fields, score: str) -> Scored | None:
    """HelpSteer's pairs: the difference of the scores is the preference."""
    for first, second, strength in _PREFERENCES:
        if first in fields.row and second in fields.row and strength in fields.row:
            value = as_number(fields.take(strength))
            scores = [None, None] if value is None else [-value / 2, value / 2]
            return Scored([fields.take(first), fields.take(second)], scores)
    return None


def _shp(fields: Fields, score: str) -> Scored | None:
    """SHP: the scores of two comments are their votes."""
    if not all(name in fields.row for name in ("human_ref_A", "human_ref_B", "score_A", "score_B")):
        return None
    fields.take("labels")  # says which score is higher
    responses = [fields.take("human_ref_A"), fields.take("human_ref_B")]
    return Scored(responses, [fields.take("score_A"), fields.take("score_B")])


_FORMS: tuple[Callable[[Fields, str], Scored | None], ...] = (
    _list, _numbered, _scored_pair, _ultrafeedback, _objects, _preference, _shp,
)  # fmt: skip


def _refuse_other_scores(row: Row) -> None:
    """Scores that are there are not replaced by 1 and 0."""
    for name, value in row.items():
        if _SCORE_NAME.fullmatch(str(name)) and isinstance(_as_list(value), list):
            hint = f"columns: {{score_chosen: {name}.0, score_rejected: {name}.1}}, or the other way round"
            raise BadRow("unknown_format", f"whose scores are those of the column {name}? Say {hint}")


def _ranked_pair(fields: Fields) -> Scored:
    for name in filter(_PAIR_SCORE.fullmatch, map(str, fields.row)):
        fields.take(name)
    return Scored([fields.take("chosen"), fields.take("rejected")], [1.0, 0.0], ranked=True)


def _ranked_byas_number(fields: Fields) -> Scored:
    """PKU-SafeRLHF's pairs."""
    responses = [fields.take("response_0"), fields.take("response_1")]
    better = re.search(r"[01]$", str(fields.take("better_response_id")).strip())
    if better is None:
        return Scored(responses, [None, None])
    return Scored(responses, [1.0, 0.0] if better[0] == "0" else [0.0, 1.0], ranked=True)


def _as_list(value: Any) -> Any:
    return read_written(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def _is_scored_object(item: Any) -> bool:
    return isinstance(item, dict) and not any(name in item for name in ("role", "from"))


def _common_key(objects: list[Row], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if any(item.get(name) is not None for item in objects)), None)


def _from_rank(rank: Any) -> Any:
    """A score of a rank, 1 for the best: the rank with its sign changed."""
    number = as_number(rank)
    return rank if number is None else -number
